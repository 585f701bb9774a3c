"""`autocompile`: the switch that compiles everything in the process, and back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from llama_index.core.evaluation import BatchEvalRunner
from llama_index.core.indices.prompt_helper import PromptHelper

from llama_index.llms.macaw import evaluators, extractors, packing
from llama_index.llms.macaw.compile import HAS_PIPELINES, aget_response, get_response
from llama_index.llms.macaw.synthesizers import LOWERINGS

_lock = threading.Lock()
_natives: list[tuple[type[Any], str, Any]] = []
"""What was replaced: class, attribute, value."""


def autocompile(enabled: bool = True) -> None:
    """Run every synthesizer, extractor, `BatchEvalRunner` and `QueryPipeline` as `compile` would, whoever made it.

    Args:
        enabled: False takes it back. What is running goes on as it began.
    """
    with _lock:
        if enabled and not _natives:
            for kind in LOWERINGS:
                _replace(kind, "get_response", get_response)
                _replace(kind, "aget_response", aget_response)
            for extractor in extractors.LOWERINGS:
                _replace(extractor, "aextract", extractors.aextract)
            for name in evaluators.METHODS:
                _replace(BatchEvalRunner, name, evaluators.aevaluate)
            _replace(PromptHelper, "get_text_splitter_given_prompt", packing.get_splitter)
            if HAS_PIPELINES:
                from llama_index.llms.macaw import pipeline

                _replace(pipeline.QueryPipeline, "_run_multi", pipeline.run_multi)
                _replace(pipeline.QueryPipeline, "_arun_multi", pipeline.arun_multi)
        elif not enabled:
            while _natives:
                setattr(*_natives.pop())


def _replace(kind: type[Any], name: str, function: Callable[..., Any]) -> None:
    """Let ``function(native, self, ...)`` run for objects of exactly this class."""
    native = getattr(kind, name)

    @functools.wraps(native)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not kind:  # a subclass, which has called its base
            return native(self, *args, **kwargs)
        return function(native, self, *args, **kwargs)

    _natives.append((kind, name, vars(kind)[name]))
    setattr(kind, name, replacement)
