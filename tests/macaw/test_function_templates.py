"""A docstring as a prompt: what becomes a message, what is refused and how."""

import inspect

import pytest

from macaw.functions.template import Placeholder, Template, Turn

CODE, TEST = Placeholder("output", "code"), Placeholder("output", "test")
TASK = Placeholder("input", "task")


def template(text, parameters=("task",), **options):
    return Template(inspect.cleandoc(text), parameters=parameters, **options)


def test_text_before_an_output_is_the_users_message():
    made = template(
        """You are an engineer.
           Write {{input:task}}.
           Code: {{output:code}}
        """
    )
    assert made.outputs == ["code"]
    assert made.prompts == {"code": (Turn("user", ("You are an engineer.\nWrite ", TASK, ".\nCode:")),)}


def test_text_after_an_output_goes_on_in_the_same_conversation():
    made = template("Write {{input:task}}. {{output:code}} Now test it. {{output:test}} Dropped.")
    first = (Turn("user", ("Write ", TASK, ".")),)
    assert made.prompts["code"] == first
    assert made.prompts["test"] == (*first, Turn("assistant", (CODE,)), Turn("user", ("Now test it.",)))


def test_text_completion_keeps_every_character():
    made = template("Write {{input:task}}.\nCode: {{output:code}}\nTest:  {{output:test}}", chat=False)
    before = ("Write ", TASK, ".\nCode: ")
    assert made.prompts["code"] == (Turn("", before),)
    assert made.prompts["test"] == (Turn("", (*before, CODE, "\nTest:  ")),)


def test_roles_make_a_conversation():
    made = template(
        """{{role:system}} You are terse.
           {{role:user}} 1 + 1? {{role:assistant}} 2
           {{role:user}} {{input:task}} {{output:code}}"""
    )
    assert made.prompts["code"] == (
        Turn("system", ("You are terse.",)),
        Turn("user", ("1 + 1?",)),
        Turn("assistant", ("2",)),
        Turn("user", (TASK,)),
    )


def test_only_constant_text_is_stripped_and_blank_messages_are_none():
    made = template("{{role:system}}  {{role:user}} {{input:task}} {{output:code}}")
    assert made.prompts["code"] == (Turn("user", (TASK,)),)


def test_plain_name_is_a_parameter_or_a_marked_output():
    made = template("Write {{task}}: {{ code }}", output_parameters=["code"])
    assert made.prompts["code"] == (Turn("user", ("Write ", TASK, ":")),)


def test_other_braces_are_text():
    made = template('{"a": {}} {{1}} {{a b}} {{input:task}} {{output:code}}')
    assert made.prompts["code"][0].pieces[0] == '{"a": {}} {{1}} {{a b}} '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Write {{input:tsak}} {{output:code}}", r"\{\{input:tsak\}\} is no parameter.*there are: task.*mean 'task'"),
        ("Write {{input:task}} {{code}}", r"\{\{code\}\} is no parameter.*\{\{output:"),
        ("Write {{inptu:task}} {{output:code}}", r"\{\{inptu:task\}\} is no placeholder. Accepted are \{\{input:task"),
        ("Write {{input:task}} {{output:task}}", r"\{\{output:task\}\} is also a parameter"),
        ("Write {{input:task}}", "has no output"),
        ("{{input:task}} {{output:code}} again {{output:code}}", r"\{\{output:code\}\} comes twice"),
        ("Write. {{output:code}}", "Parameter 'task' is not in the prompt"),
        ("{{output:code}} {{input:task}}", r"\{\{output:code\}\} answers nothing"),
        ("{{input:task}} {{output:code}} {{output:test}}", r"\{\{output:test\}\} answers nothing"),
        ("{{input:task}} {{role:assistant}} Code: {{output:code}}", "answers nothing.*chat=False"),
        ("{{role:robot}} {{input:task}} {{output:code}}", r"\{\{role:robot\}\} is no role. Roles are system, user"),
    ],
)
def test_wrong_prompt_is_refused_with_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        template(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{output:code}} {{input:task}}", r"Nothing comes before \{\{output:code\}\}"),
        ("{{role:user}} {{input:task}} {{output:code}}", r"\{\{role:user\}\} needs chat=True"),
    ],
)
def test_wrong_text_completion_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        template(text, chat=False)
