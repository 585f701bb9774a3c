"""langchain-tests' unit tests of chat models."""

from __future__ import annotations

from typing import Any

from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_macaw import ChatMacaw


class TestChatMacaw(ChatModelUnitTests):
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
