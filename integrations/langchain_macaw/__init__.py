"""LangChain on Macaw: `ChatMacaw` in the place of `ChatOpenAI`, and `compile` to send a chain's calls as one program."""

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.compile import compile

__all__ = ["ChatMacaw", "compile"]
