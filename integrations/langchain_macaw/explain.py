"""`explain`: what a run of a chain would send, what it leaves to client code, and why. Nothing is sent or run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from langchain_core.output_parsers import BaseLLMOutputParser
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator, RunnableLambda, ensure_config
from langchain_core.runnables.base import RunnableLike, coerce_to_runnable
from langchain_core.tools import BaseTool

import langchain_macaw.rules  # noqa: F401  (registers the rules of lowering)
from langchain_macaw.compile import CompiledChain
from langchain_macaw.explanation import Explanation, Step
from langchain_macaw.lowering import Lowering, Scope
from langchain_macaw.pending import Pending, Rendered, unknowns
from langchain_macaw.registry import contains_model, rule_for
from langchain_macaw.sentinel import ESCAPED_SUFFIX, NotStatic, Opaque, Variable
from langchain_macaw.steps import ClientStep, watched
from langchain_macaw.templates import RequestTemplate

_CLIENT_STEPS: list[tuple[type[Any], str]] = [
    (RunnableLambda, "a function"),
    (RunnableGenerator, "a generator"),
    (BaseTool, "a tool"),
    (BaseRetriever, "a retriever"),
    (BaseLLMOutputParser, "a parser that reads the text"),
]


def explain(
    chain: RunnableLike[Any, Any], input: Any, config: RunnableConfig | None = None, **kwargs: Any
) -> Explanation:
    """Say what ``compile(chain).invoke(input, config)`` would send at once, and what not, and why.

    Templates are run, as for every plan; models, functions, tools and retrievers are not.

    Example:
        .. code-block:: python

            print(explain(chain, {"topic": "parrots"}))
            explain(chain, {"topic": "parrots"}).to_mermaid()

    Args:
        chain: What `compile` takes.
        input: Of the run.
        config: Of the run; what counts is `configurable`.
        kwargs: Of the run.
    """
    runnable: Runnable[Any, Any] = coerce_to_runnable(chain)
    while isinstance(runnable, CompiledChain):
        runnable = runnable.bound
    lowering = _Explaining()
    lowering.lower(watched(runnable), input, Scope("", kwargs, ensure_config(config).get("configurable", {})))
    return Explanation(lowering.steps)


class _Explaining(Lowering):
    """A lowering that notes what becomes of each Runnable."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._around: list[Step] = []
        self._reason: Exception | None = None
        self._makers: dict[str | Pending | Rendered, Step] = {}  # of variables, values to come, refused prompts

    def lower(self, runnable: Runnable[Any, Any], value: Any, scope: Scope) -> Any:
        """As the base, and note it."""
        if isinstance(runnable, ClientStep):
            number = len(self.steps)
            result = super().lower(runnable, value, scope)
            self._made(self.steps[number], result)
            return result
        step = Step(_name(runnable), scope.path.strip("/"), len(self._around), contains_model(runnable))
        self.steps.append(step)
        self._around.append(step)
        num_steps, self._reason = len(self.steps), None
        result = super().lower(runnable, value, scope)
        if isinstance(result, Rendered) and result is not value:
            self._try(result)
        self._around.pop()
        if not step.verdict and (self._reason or len(self.steps) == num_steps):
            self._judge(step, runnable, value, result)
        if self._reason and isinstance(result, Rendered):
            self._makers[result] = step
        self._reason = None
        self._made(step, result)
        return result

    def when(self, value: Any, proceed: Callable[[Any], Any], *, may_call: bool) -> Any:
        """As the base, and note it."""
        result = super().when(value, proceed, may_call=may_call)
        if isinstance(result, Opaque):
            step = self._around[-1]
            step.verdict, step.sources = "dynamic", self._sources(unknowns(value))
            step.why = _waits(step)
        return result

    def add_call(self, model: Any, template: RequestTemplate, path: str) -> Any:
        """As the base, and note it."""
        answer = super().add_call(model, template, path)
        planned, _ = self._new[-1]
        step = self._around[-1]
        names = sorted(template.variables, key=lambda name: (len(name), name))  # in the order of the calls
        step.verdict, step.sources = "call", self._sources(map(Variable, names))
        step.call_id = planned.id
        step.why = f"{planned.id} reads {step.names_of_sources() or 'the input only'}"
        self._makers[planned.output] = step
        return answer

    def refused(self, runnable: Runnable[Any, Any], reason: Exception) -> None:
        """As the base, and note it."""
        super().refused(runnable, reason)
        self._reason = reason

    def _judge(self, step: Step, runnable: Runnable[Any, Any], value: Any, result: Any) -> None:
        unknown, reason = [*unknowns(value)], self._reason
        step.sources = [self._makers[value]] if isinstance(value, Rendered) and value in self._makers else []
        if any(source.verdict == "fails" for source in step.sources):
            step.why = f"is not reached: {step.names_of_sources()} fails"
            return
        step.sources = step.sources or self._sources(unknown)
        if rule_for(runnable) is None:
            kind = next((name for kind, name in _CLIENT_STEPS if isinstance(runnable, kind)), "not known to Macaw")
            step.verdict, step.why = "client", f"{kind}: runs natively, once"
        elif not isinstance(result, Opaque) and not reason:
            step.verdict = "static"
        elif reason and all(isinstance(one, Variable) for one in unknown) and not isinstance(value, Rendered):
            step.verdict = "dynamic" if isinstance(reason, NotStatic) else "fails"
            what = str(reason.args[0] if reason.args else reason).split("\n")[0].strip()
            step.why = what if isinstance(reason, NotStatic) else f"{type(reason).__name__}: {what}"
        elif reason or isinstance(result, Pending):
            step.verdict, step.why = "dynamic", _waits(step)
        else:
            step.verdict, step.why = "dynamic", "another server, key or HTTP client: ordinary requests"

    def _try(self, rendered: Rendered) -> None:
        """Render a prompt now, so that what is wrong with it is said where it is, and not at its model."""
        try:
            rendered.build(self.stand_ins[0])
        except Exception as reason:
            self._reason = reason

    def _made(self, step: Step, result: Any) -> None:
        for one in unknowns(result):
            if isinstance(one, Pending):
                self._makers.setdefault(one, step)

    def _sources(self, values: Iterable[Any]) -> list[Step]:
        keys = [one.name.removesuffix(ESCAPED_SUFFIX) if isinstance(one, Variable) else one for one in values]
        return list(dict.fromkeys(self._makers[key] for key in keys if key in self._makers))


def _name(runnable: Runnable[Any, Any]) -> str:
    """The function's own name rather than LangChain's `RunnableLambda`."""
    function = getattr(runnable, "func", None) or getattr(runnable, "afunc", None)
    name = getattr(function, "__qualname__", "")
    return name if isinstance(runnable, RunnableLambda) and name and "<" not in name else runnable.get_name()


def _waits(step: Step) -> str:
    return f"planned when it is known: {step.names_of_sources()}"
