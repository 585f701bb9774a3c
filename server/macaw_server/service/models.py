"""The models that a server serves, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from macaw.errors import EngineFailedError, UnknownModelError
from macaw_server.service.types import ServedModel


class ModelRegistry:
    """Finds models; iterates over them in the order of serving."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        assert len(self._models) == len(models) > 0, f"{len(models)} models with {len(self._models)} names"

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def find(self, name: str | None, *, param: str | None = "model") -> ServedModel:
        """The model of this name; without a name the only one there is.

        Raises:
            UnknownModelError: Not served, or no name where several are.
        """
        if name is None and len(self._models) == 1:
            return next(iter(self))
        if name not in self._models:
            seen = "No model was named" if name is None else f"Model {name!r} is not served"
            raise UnknownModelError(f"{seen}. Served: {', '.join(map(repr, self._models))}.", param=param)
        return self._models[name]

    def find_working(self, name: str | None, *, param: str | None = "model") -> ServedModel:
        """As `find`, for a model that is to be used.

        Raises:
            EngineFailedError: Its engine is gone for good.
        """
        model = self.find(name, param=param)
        if (status := model.engine.status) in ("failed", "stopped"):
            raise EngineFailedError(
                f"The engine of model {model.name!r} has {status} and takes no calls. Restart the server; "
                "its log may say why."
            )
        return model
