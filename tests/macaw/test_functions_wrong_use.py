"""Wrong use is refused at once, and the message points at the function and the argument."""

import pytest

import macaw
from functions_on_script import review, shout, write

pytestmark = pytest.mark.usefixtures("quick_end")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: write(), r"write\(task, language='Python'\): missing a required argument: 'task'"),
        (lambda: write("a", "b", "c"), r"write\(task, language='Python'\): too many positional arguments"),
        (lambda: write("a", speech="b"), r"write.*unexpected keyword argument 'speech'"),
        (lambda: write(["a"]), r"write\(\): argument 'task' got a list.*json.dumps.*macaw.join"),
        (lambda: write("a", language=None), r"write\(\): argument 'language' got None"),
        (lambda: shout(), r"shout\(text\): missing a required argument: 'text'"),
        (lambda: macaw.join(["a", 3]), r"join\(\) got 3; texts and semantic variables"),
        (lambda: macaw.function(3), "@macaw.function goes on a Python function, not on 3"),
    ],
)
def test_type_errors_point_at_function_and_argument(session, make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: write("\ud800"), r"write\(\): argument 'task' holds half a surrogate pair"),
        (lambda: review("x").get("speed"), "objective 'speed' is not one of"),
        (lambda: review("x").get(deadline_ms=0), "deadline_ms 0 is not over 0"),
        (lambda: macaw.variable("a snake game"), r"variable name 'a snake game' is not one word.*value="),
        (lambda: macaw.native_function(outputs="ab")(len), "outputs 'ab' are not a list of different names"),
        (
            lambda: macaw.function(outputs={"cod": {}})(write.__wrapped__),
            r"write\(\) has no output 'cod'; it has: code",
        ),
        (
            lambda: macaw.function(max_token=3)(write.__wrapped__),
            r"write\(\): sampling of output 'code': max_token: Extra",
        ),
        (lambda: macaw.function(lambda x: x), r"<lambda>\(\) has no docstring, which is its prompt"),
    ],
)
def test_wrong_values_are_refused_at_once(session, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_prompt_names_the_function():
    with pytest.raises(ValueError, match=r"Prompt of broken\(\): \{\{input:tsak\}\} is no parameter"):

        @macaw.function
        def broken(task):
            """{{input:tsak}} {{output:code}}"""


def test_variadic_parameters_have_no_place():
    with pytest.raises(ValueError, match=r"many\(\) has a parameter \*texts"):

        @macaw.function
        def many(*texts):
            """{{input:texts}} {{output:code}}"""


def test_marked_parameters_are_outputs_in_their_order(session):
    @macaw.function
    def plan(second: macaw.Output(max_tokens=3), task: macaw.Input, first: "macaw.Output"):
        """{{task}} {{first}} more {{second}}"""

    assert plan.outputs == ["second", "first"]
    assert repr(plan) == "<macaw.function plan(task: macaw.functions.function.Input) -> second, first>"
    assert [variable.name for variable in plan("x")] == ["second", "first"]
