"""What a model asks its server beside answers: its profile, and how long prompts are."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

import openai
from langchain_core.language_models import ModelProfile

from macaw.protocol import Tokens

logger = logging.getLogger(__name__)


def served_profile(client: openai.OpenAI | None, model_name: str) -> ModelProfile | None:
    """What ``GET /v1/models/{name}`` says, in LangChain's terms; None if the server cannot be asked now."""
    if client is None:
        return None
    try:
        served: Any = client.get(f"/models/{quote(model_name)}", cast_to=object)
    except openai.OpenAIError as error:
        logger.warning("The profile of model %r is not known: %s", model_name, error)
        return None
    tools = served["tool_calling"]
    return ModelProfile(
        name=served["id"],
        max_input_tokens=served["max_model_len"],
        max_output_tokens=served["max_model_len"],
        text_inputs=True,
        image_inputs=False,
        image_url_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        image_tool_message=False,
        pdf_tool_message=False,
        text_outputs=True,
        image_outputs=False,
        audio_outputs=False,
        video_outputs=False,
        reasoning_output=False,
        tool_calling=tools,
        tool_choice=tools,
        tool_call_streaming=tools,
        structured_output=True,
        temperature=True,
    )


def tokenize(client: openai.OpenAI, body: dict[str, Any]) -> Tokens:
    """The prompt that the server makes of a request's body. Raises what `openai`'s client raises."""
    return Tokens.model_validate(client.post("/tokenize", body=body, cast_to=object))
