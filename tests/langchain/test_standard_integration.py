"""langchain-tests' integration tests of chat models, all of them but multimodal ones, on a real server.

What they ask of a model, ours has learnt by heart: see `capable_model`.
"""

from __future__ import annotations

from typing import Any

import pytest
from capable_model import MODEL, OTHER_MODEL
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_macaw import ChatMacaw
from macaw_server.serve import LocalServer

pytestmark = [
    pytest.mark.slow,
    # The tests use what LangChain calls beta (as_tool).
    pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning"),
]


class TestChatMacaw(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _served(self, capable_server: LocalServer) -> None:
        self._url = f"{capable_server.url}/v1"

    @property
    def chat_model_class(self) -> type[ChatMacaw]:
        return ChatMacaw

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": self._url, "temperature": 0, "max_tokens": 200}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def returns_usage_metadata(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return OTHER_MODEL

    @property
    def supported_usage_metadata_details(self) -> dict[Any, list[Any]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second of two equal requests."""
        model, prompt = self.chat_model_class(**self.chat_model_params), "This is a text of several words. " * 20
        model.invoke(prompt)
        if not stream:
            answer = model.invoke(prompt)
        else:
            first, *rest = model.stream(prompt)
            answer = sum(rest, first)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_the_learnt_joke(capable_server: LocalServer, method: Any) -> None:
    """Beside the standard tests, which look at the keys alone."""
    joke = {
        "title": "Joke",
        "type": "object",
        "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}},
    }
    model: BaseChatModel = ChatMacaw(model=MODEL, base_url=f"{capable_server.url}/v1", temperature=0, max_tokens=200)
    structured = model.with_structured_output({**joke, "description": "A joke.", "required": ["setup"]}, method=method)
    answer = structured.invoke("Tell me a joke about cats.")
    assert isinstance(answer, dict)
    assert set(answer) <= {"setup", "punchline"}
    if method == "json_schema":
        assert answer == {"setup": "Why did the cat sit?", "punchline": "It was tired."}
