"""LlamaIndex on Macaw: `Macaw` instead of `OpenAI` or `OpenAILike`."""

from llama_index.llms.macaw.base import Macaw

__all__ = ["Macaw"]
