"""`QueryPipeline` of llama-index-core up to 0.12, compiled. Import this only where that module exists.

The pipeline's own scheduler runs ahead on stand-ins for answers: prompts and components that only move values are
run, LLM components become calls of the program, and every other component ends the way ahead: when it has run,
what has become known behind it is the next program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.llms.llm import LLMChatComponent, LLMCompleteComponent  # type: ignore[attr-defined]
from llama_index.core.prompts.base import PromptComponent  # type: ignore[attr-defined]
from llama_index.core.query_pipeline import ArgPackComponent, InputComponent
from llama_index.core.query_pipeline import QueryPipeline as QueryPipeline
from llama_index.core.query_pipeline.components.argpacks import KwargPackComponent
from llama_index.core.query_pipeline.query import RunState

from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.lowering import Lowering
from llama_index.llms.macaw.running import CURRENT_RUN, Lowered, Run

logger = logging.getLogger(__name__)

_LLMS = (LLMCompleteComponent, LLMChatComponent)
_MOVERS = (PromptComponent, InputComponent, ArgPackComponent, KwargPackComponent)


class PipelineRun(Run):
    """A run of a pipeline; `planned` are the keys of the modules that are calls of its programs."""

    def __init__(self, owner: object, *, asynchronous: bool) -> None:
        super().__init__(owner, asynchronous=asynchronous)
        self.planned: set[str] = set()


class CompiledPipeline(QueryPipeline):  # type: ignore[misc]
    """What `compile` makes of a pipeline; it shares modules and graph with the original."""

    def _run_multi(self, *args: Any, **kwargs: Any) -> Any:
        run = PipelineRun(self, asynchronous=False)
        try:
            return run.call(super()._run_multi, *args, **kwargs)
        finally:
            run.close()

    async def _arun_multi(self, *args: Any, **kwargs: Any) -> Any:
        run = PipelineRun(self, asynchronous=True)
        try:
            return await run.acall(super()._arun_multi(*args, **kwargs))
        finally:
            await run.aclose()

    def get_run_state(self, *args: Any, **kwargs: Any) -> RunState:
        """As the original's; in a run, what is known by now is sent ahead."""
        state = super().get_run_state(*args, **kwargs)
        self._send_ahead(state)
        return state

    def process_component_output(self, output_dict: dict[str, Any], module_key: str, run_state: RunState) -> None:
        """As the original's; in a run, what is known by this output only is sent ahead."""
        super().process_component_output(output_dict, module_key, run_state)
        if not self._is_seen_through(module_key):
            self._send_ahead(run_state)

    def _is_known(self, key: str) -> bool:
        """Whether a module is a call, or one that only moves values."""
        module = self.module_dict[key]
        if type(module) in _LLMS:
            return isinstance(module.llm, Macaw) and not module.streaming
        return type(module) in _MOVERS and not getattr(module, "convert_fn", None)

    def _is_seen_through(self, key: str) -> bool:
        """Whether it is known what a module hands on before it has run: not if a link calls a function."""
        links = (data for *_, data in self.dag.edges(key, data=True))
        return self._is_known(key) and not any(link["input_fn"] or link["condition_fn"] for link in links)

    def _send_ahead(self, state: RunState) -> None:
        run = CURRENT_RUN.get()
        if not isinstance(run, PipelineRun) or run.owner is not self:
            return
        if (lowered := self._lower(state, run.planned)) is not None:
            run.add(lowered)

    def _lower(self, state: RunState, planned: set[str]) -> Lowered | None:
        """The calls that are known ahead in `state` and not in `planned`, where they are put."""
        lowering = Lowering("QueryPipeline")
        ahead = RunState(state.module_dict, {})
        ahead.all_module_inputs = {key: dict(inputs) for key, inputs in state.all_module_inputs.items()}
        ahead.executed_modules = set(state.executed_modules)
        added = []
        while keys := self.get_next_module_keys(ahead):
            for key in keys:
                module, inputs, outputs = self.module_dict[key], ahead.all_module_inputs[key], None
                if key not in planned and self._is_known(key):
                    outputs = _outputs(lowering, key, module, inputs)
                if outputs is not None and type(module) in _LLMS:
                    added.append(key)
                if outputs is not None and self._is_seen_through(key):
                    super().process_component_output(outputs, key, ahead)
                else:
                    ahead.executed_modules.add(key)
        plan = lowering.plan()
        planned.update(added)
        return Lowered(plan, lowering.llm) if plan and lowering.llm else None


def compile_pipeline(pipeline: QueryPipeline) -> CompiledPipeline:
    """A compiled copy."""
    compiled = object.__new__(CompiledPipeline)  # QueryPipeline's own says again that the class is deprecated
    state = pipeline.__getstate__()
    compiled.__setstate__({**state, "__dict__": dict(state["__dict__"])})
    return compiled


def run_multi(native: Callable[..., Any], pipeline: QueryPipeline, *args: Any, **kwargs: Any) -> Any:
    """``native(pipeline, ...)``, compiled; for `autocompile`."""
    return compile_pipeline(pipeline)._run_multi(*args, **kwargs)


async def arun_multi(native: Callable[..., Any], pipeline: QueryPipeline, *args: Any, **kwargs: Any) -> Any:
    """The asynchronous `run_multi`."""
    return await compile_pipeline(pipeline)._arun_multi(*args, **kwargs)


def _outputs(lowering: Lowering, key: str, module: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What a module makes of its inputs, with stand-ins for answers; None if that is not known."""
    if any(isinstance(value, Generator) for value in inputs.values()):
        return None  # it can be read once only
    try:
        if type(module) not in _LLMS:
            outputs: dict[str, Any] = module.run_component(**inputs)
            return outputs
        inputs = module.validate_component_inputs({**inputs, **module.partial_dict})
        if type(module) is LLMChatComponent:
            text = lowering.chat(module.llm, inputs["messages"], f"call-{key}")
            return {"output": ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text))}
        return {"output": CompletionResponse(text=lowering.complete(module.llm, inputs["prompt"], f"call-{key}"))}
    except Exception as error:  # native code meets the same, and there it is the user's to see
        logger.debug("Module %s could not be lowered: %r", key, error)
        return None


CompiledPipeline.__name__ = QueryPipeline.__name__  # which is in the ids of spans
