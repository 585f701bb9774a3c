"""How each kind of Runnable is lowered; see `langchain_macaw.lowering`.

A rule computes what `invoke` would return, with `Variable` and `Answer` in place of what models have yet to
write, and raises whatever it likes where it cannot.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.load import dumps
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import (
    RouterRunnable,
    RunnableAssign,
    RunnableBinding,
    RunnableBranch,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    RunnablePick,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase, RunnableEach
from langchain_core.runnables.configurable import DynamicRunnable, RunnableConfigurableAlternatives
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.runnables.retry import RunnableRetry

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.lowering import Lowering, Scope
from langchain_macaw.pending import FAILS, rendered
from langchain_macaw.registry import contains_model, rule
from langchain_macaw.sentinel import OPAQUE, Answer, NotStatic, Opaque, Variable, is_symbolic
from langchain_macaw.templates import RequestTemplate, request_body, request_template

_TAKEN_BY_LANGCHAIN = {
    "ls_structured_output_format",
    "structured_output_format",
}  # arguments that the model never sees


# -----------------------------------------------------------------------------------------------------------
# Composition


@rule(RunnableSequence, parts=("first", "middle", "last"))
def _sequence(lowering: Lowering, sequence: RunnableSequence[Any, Any], value: Any, scope: Scope) -> Any:
    for i, step in enumerate(sequence.steps):
        value = lowering.lower(step, value, scope if i == 0 else scope.at())
    return value


@rule(RunnableParallel, parts=("steps__",))
def _parallel(lowering: Lowering, parallel: RunnableParallel[Any], value: Any, scope: Scope) -> Any:
    return {key: lowering.lower(step, value, scope.at(f"/{key}")) for key, step in parallel.steps__.items()}


@rule(RunnableAssign, parts=("mapper",))
def _assign(lowering: Lowering, assign: RunnableAssign, value: Any, scope: Scope) -> Any:
    known = _known_dict(value)
    return {**known, **lowering.lower(assign.mapper, value, scope.at())}


@rule(RunnableEach, parts=("bound",))
def _each(lowering: Lowering, each: RunnableEach[Any, Any], value: Any, scope: Scope) -> Any:
    if not isinstance(value, list | tuple):
        raise NotStatic("The items of a list are not known ahead.")
    return [
        lowering.lower(each.bound, item, Scope(f"{scope.path}[{i}]", scope.kwargs, scope.configurable))
        for i, item in enumerate(value)
    ]


@rule(RouterRunnable, parts=("runnables",))
def _router(lowering: Lowering, router: RouterRunnable[Any], value: Any, scope: Scope) -> Any:
    known = _known_dict(value)
    return lowering.when(
        known["key"],
        lambda key: lowering.lower(router.runnables[key], known["input"], scope.at(f"/{key}")),
        may_call=contains_model(router),
    )


@rule(RunnableBranch, parts=("branches", "default"))
def _branch(lowering: Lowering, branch: RunnableBranch[Any, Any], value: Any, scope: Scope) -> Any:
    """Conditions are asked one after the other, as natively."""

    def ask(i: int) -> Any:
        if i == len(branch.branches):
            return lowering.lower(branch.default, value, Scope(f"{scope.path}/else", scope.kwargs, scope.configurable))
        condition, runnable = branch.branches[i]
        chosen = Scope(f"{scope.path}/if{i}", scope.kwargs, scope.configurable)
        return lowering.when(
            lowering.lower(condition, value, scope.at(f"/if{i}?")),
            lambda holds: lowering.lower(runnable, value, chosen) if holds else ask(i + 1),
            may_call=contains_model(branch),
        )

    return ask(0)


@rule(RunnableBinding, RunnableRetry, RunnableWithMessageHistory, parts=("bound",))
def _binding(lowering: Lowering, binding: RunnableBindingBase[Any, Any], value: Any, scope: Scope) -> Any:
    """A retry is planned for its first attempt; another attempt is an ordinary request."""
    kwargs = {**binding.kwargs, **scope.kwargs}
    configurable = {**binding.config.get("configurable", {}), **scope.configurable}
    return lowering.lower(binding.bound, value, Scope(scope.path, kwargs, configurable))


@rule(RunnableConfigurableAlternatives, parts=("default", "alternatives"))
@rule(DynamicRunnable, whole=True)
def _configurable(lowering: Lowering, dynamic: DynamicRunnable[Any, Any], value: Any, scope: Scope) -> Any:
    runnable, config = dynamic.prepare(RunnableConfig(configurable=dict(scope.configurable)))
    return lowering.lower(runnable, value, Scope(scope.path, scope.kwargs, config.get("configurable", {})))


@rule(RunnableWithFallbacks, parts=("runnable", "fallbacks"))
def _with_fallbacks(lowering: Lowering, runnable: RunnableWithFallbacks[Any, Any], value: Any, scope: Scope) -> Any:
    """The first choice is planned, and a fallback if it is known that what comes before it fails."""
    results = (lowering.lower(choice, value, scope) for choice in runnable.runnables)
    return next((result for result in results if result is not FAILS), FAILS)


# -----------------------------------------------------------------------------------------------------------
# Values


@rule(RunnablePassthrough)
def _passthrough(lowering: Lowering, passthrough: RunnablePassthrough[Any], value: Any, scope: Scope) -> Any:
    """A function on the side is a client step, but what comes out is what went in."""
    return value


@rule(RunnablePick)
def _pick(lowering: Lowering, pick: RunnablePick, value: Any, scope: Scope) -> Any:
    known = _known_dict(value)
    if isinstance(pick.keys, str):
        return known.get(pick.keys)
    return {key: known[key] for key in pick.keys if key in known} or None


def _moves_values(step: RunnableLambda[Any, Any]) -> bool:
    """Of all functions, `operator.itemgetter` is the one that is known not to look at what it moves."""
    return type(getattr(step, "func", None)) is operator.itemgetter and not hasattr(step, "afunc")


@rule(RunnableLambda, applies=_moves_values)
def _itemgetter(lowering: Lowering, step: RunnableLambda[Any, Any], value: Any, scope: Scope) -> Any:
    return step.func(value, **scope.kwargs)


@rule(StrOutputParser, applies=lambda parser: type(parser) is StrOutputParser)  # a subclass may read the text
def _text(lowering: Lowering, parser: StrOutputParser, value: Any, scope: Scope) -> Any:
    match value:
        case Answer(variable):
            return variable
        case Variable() | str():
            return value
        case BaseMessage():
            return parser.parse_result([ChatGeneration(message=value)])
    raise NotStatic("The text of an answer is not known ahead.")


def _selects_no_examples(prompt: Any) -> bool:
    """An example selector may be a search in a vector store: a client step inside a prompt."""
    fields = vars(prompt)  # getattr() for a field that is not there is slow in pydantic
    return fields.get("example_selector") is None and all(map(_selects_no_examples, fields.get("messages") or ()))


@rule(BasePromptTemplate, applies=_selects_no_examples)
def _prompt(lowering: Lowering, prompt: BasePromptTemplate[Any], value: Any, scope: Scope) -> Any:
    if isinstance(value, Opaque):
        raise NotStatic("The variables of a prompt are not known ahead.")
    return rendered(prompt._format_prompt_with_error_handling, value)


def _known_dict(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise NotStatic("The keys of a value are not known ahead.")
    return value


# -----------------------------------------------------------------------------------------------------------
# Models


@rule(ChatMacaw, whole=True)
def _model(lowering: Lowering, model: ChatMacaw, value: Any, scope: Scope) -> Any:
    if isinstance(value, Opaque):
        raise NotStatic("The input of a model is not known ahead.")
    if not model._can_join(lowering.model):
        return OPAQUE
    kwargs = {name: arg for name, arg in scope.kwargs.items() if name not in _TAKEN_BY_LANGCHAIN}
    if is_symbolic(value):
        template = request_template(
            lambda stand_ins: model._get_request_payload(stand_ins.fill(value), **kwargs), lowering.stand_ins
        )
    elif not lowering.streaming and (message := _cached_answer(model, value, kwargs)) is not None:
        return message
    else:
        template = RequestTemplate(request_body(model._get_request_payload(value, **kwargs)))
    return lowering.add_call(model, template, scope.path)


def _cached_answer(model: ChatMacaw, value: Any, kwargs: Mapping[str, Any]) -> BaseMessage | None:
    """The answer in LangChain's own cache, by the key that `BaseChatModel` uses."""
    cache = model.cache if isinstance(model.cache, BaseCache) else get_llm_cache()
    if cache is None or model.cache is False:
        return None
    messages = [message.model_copy(update={"id": None}) for message in model._convert_input(value).to_messages()]
    stop, rest = kwargs.get("stop"), {name: arg for name, arg in kwargs.items() if name != "stop"}
    generations = cache.lookup(dumps(messages), model._get_llm_string(stop=stop, **rest))
    return cast("ChatGeneration", generations[0]).message if generations else None
