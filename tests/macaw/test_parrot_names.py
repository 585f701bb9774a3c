"""Parrot's published names: formats, marks and sampling; a whole program runs in tests/end_to_end/test_functions.py."""

import logging

import pytest

from macaw import NativeFunctionError
from macaw import parrot as P
from macaw.functions.function import Function
from macaw.functions.session import Session

LATER = [P.Output, P.Output()]


@pytest.fixture(autouse=True)
def session():
    with Session("http://127.0.0.1:9") as session:
        yield session


def prompt(call):
    return [text for _, text in call.producer.turns]


def test_prompt_is_a_text_completion_in_one_line():
    @P.semantic_function()
    def qa(question: P.Input, answer: P.Output):
        """You answer.
        The question is: {{question}}.

            The answer is: {{answer}}.
        """

    assert isinstance(qa, Function)
    assert prompt(qa("why?")) == [("You answer. The question is: ", "why?", ". The answer is: ")]


def test_formatter_that_keeps_lines_and_none():
    def qa(question: P.Input, answer: P.Output):
        """Say:
        {{question}}
        {{answer}}"""

    keeping = P.semantic_function(formatter=P.allowing_newline)(qa)
    raw = P.semantic_function(formatter=None)(qa)
    assert prompt(keeping("a")) == [("Say:\n", "a", "\n")]
    assert prompt(raw("a")) == [("Say:\n        ", "a", "\n        ")]


def test_sampling_config_is_openais():
    @P.semantic_function(models=["m"])
    def qa(
        question: P.Input,
        answer: P.Output(
            sampling_config=P.SamplingConfig(max_gen_length=50, ignore_tokenizer_eos=True, stop_str=["\n"])
        ),
    ):
        """{{question}}{{answer}}"""

    options = qa("a").producer.options
    assert options["model"] == "m"
    assert (options["max_tokens"], options["ignore_eos"], options["stop"]) == (50, True, ["\n"])


def test_several_models_are_refused():
    with pytest.raises(ValueError, match=r"models=\['a', 'b'\]: name at most one"):
        P.semantic_function(models=["a", "b"])


def test_native_function_sets_its_outputs_or_returns_them():
    @P.native_function()
    def both(text: P.Input, low: P.Output, high: P.Output):
        high.set(text.upper())
        low.set(text.lower())

    @P.native_function
    def concat(a: P.Input, b: P.Input):
        return a + b

    @P.native_function()
    def forgetful(text: P.Input, low: P.Output):
        pass

    low, high = both("Ab")
    later = P.variable("later")
    whole = concat(high, later)
    later.set("!")
    assert (low.get(), whole.get()) == ("ab", "AB!")
    with pytest.raises(
        NativeFunctionError, match=r"forgetful\(\): output 'low' failed.*low\.set\(\) was called 0 times"
    ):
        forgetful("x").get()


def test_variables_have_their_text():
    assert P.SemanticVariable("a snake game").get(perf=P.LATENCY) == "a snake game"
    assert P.variable(name="a", content="Hello").get() == "Hello"


def test_debug_mode_shows_what_is_sent(caplog):
    logger = logging.getLogger("macaw")
    before = logger.level
    P.VirtualMachine(os_http_addr="http://127.0.0.1:9", mode="debug")
    assert logger.level == logging.DEBUG
    logger.setLevel(before)
