"""Which form of calls a model has, and what the operator may say of it."""

import copy
from typing import get_args

import pytest

from macaw_server.config import ServerConfig
from macaw_server.errors import ConfigError
from macaw_server.service import ServedModel
from macaw_server.service.tools import check_parser, tool_format
from macaw_server.tool_calls import FORMATS
from server.service.harness import ScriptedEngine, tokenizer


def served(parser, template=None):
    copied = copy.deepcopy(tokenizer())
    copied.chat_template = template or copied.chat_template
    return ServedModel("m", copied, ScriptedEngine(), 0, tool_call_parser=parser)


def test_the_flag_names_all_forms():
    literal, _ = get_args(ServerConfig.model_fields["tool_call_parser"].annotation)
    assert get_args(literal) == tuple(FORMATS)


def test_the_operator_overrides_the_template():
    model = served("llama3_json", "{{ tools | tojson }}<tool_call>")
    check_parser(model)
    assert tool_format(model) is FORMATS["llama3_json"]
    assert tool_format(served(None, "{{ tools | tojson }}<tool_call>")) is FORMATS["hermes"]


def test_a_form_that_the_model_is_never_told_of_is_refused():
    for parser in (None, "hermes"):
        check_parser(served(parser))
    with pytest.raises(ConfigError, match=r"--tool-call-parser mistral: .* in the form of hermes"):
        check_parser(served("mistral"))
