"""LlamaIndex on Macaw: `Macaw` instead of `OpenAI` or `OpenAILike`; `compile` sends an engine's calls as programs."""

from llama_index.llms.macaw.autocompile import autocompile
from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.compile import compile

__all__ = ["Macaw", "autocompile", "compile"]
