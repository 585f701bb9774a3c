"""LangChain on Macaw: `ChatMacaw` instead of `ChatOpenAI`; `compile` sends a chain's calls as one program."""

from langchain_macaw.autocompile import autocompile
from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.compile import compile
from langchain_macaw.explain import explain
from langchain_macaw.llms import MacawLLM

__all__ = ["ChatMacaw", "MacawLLM", "autocompile", "compile", "explain"]
