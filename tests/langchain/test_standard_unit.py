"""langchain-tests' unit tests of chat models."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumpd, load
from langchain_tests.unit_tests import ChatModelUnitTests
from syrupy.assertion import SnapshotAssertion

from langchain_macaw import ChatMacaw, MacawLLM


class TestChatMacaw(ChatModelUnitTests):
    @pytest.mark.xfail(
        raises=ValueError,
        strict=True,
        reason="It reads the model back with allowed_objects='all', by which langchain-core means the partner packages "
        "on its own list. Naming the class works: see test_it_is_read_back_where_the_class_is_named.",
    )
    def test_serdes(self, model: BaseChatModel, snapshot: SnapshotAssertion) -> None:
        super().test_serdes(model, snapshot)

    @property
    def chat_model_class(self) -> type[ChatMacaw]:
        return ChatMacaw

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"MACAW_API_KEY": "api_key", "MACAW_BASE_URL": "http://macaw.invalid/v1"}
        expected = {"openai_api_key": "api_key", "openai_api_base": "http://macaw.invalid/v1"}
        return environment, {"model": "m"}, expected


@pytest.mark.parametrize("kind", [ChatMacaw, MacawLLM])
@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_it_is_read_back_where_the_class_is_named(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_API_KEY", "sk-1234")
    model = kind(model="m", temperature=0.5, stop=["x"], hints=False, top_k=3)
    written = dumpd(model)
    assert "sk-1234" not in str(written)
    read = load(written, allowed_objects=[kind], valid_namespaces=["langchain_macaw"], secrets_from_env=True)
    assert dumpd(read) == written
    assert read.openai_api_key.get_secret_value() == "sk-1234"
