"""A tiny model that has learnt by heart what langchain-tests' standard conversations need.

The standard tests ask for a model that answers "What is the value of magic_function(3)? Use the tool." with a call of
it. No model of that size can; so this one is trained on those very conversations, on the CPU, before the tests run. It
is a real transformer on the real engine, and its answers say nothing about what it knows: the tests are about what
lies between LangChain and the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableBinding
from langchain_core.tools import tool
from langchain_core.utils.function_calling import tool_example_to_messages
from langchain_tests.integration_tests import chat_models as standard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import macaw_server.models
from langchain_macaw import ChatMacaw
from langchain_macaw.templates import request_body
from macaw.protocol import ChatCompletionRequest
from macaw_server.programs.rendering import prompt_text
from tiny_models import make_model

MODEL, OTHER_MODEL = "capable", "capable-too"
"""The names under which it is served."""

END = "<|im_end|>"
VOCAB_SIZE = 1200
NUM_STEPS = 400
TEMPLATE = (Path(macaw_server.models.__file__).parent / "demo" / "chat_template.jinja").read_text()

JOKE = json.dumps({"setup": "Why did the cat sit?", "punchline": "It was tired."})


def call(name: str, **arguments: Any) -> str:
    """How this template's models write a call."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


@tool
def my_adder_tool(a: int, b: int) -> int:
    """Tool that adds two integers.

    Takes two integers, a and b, and returns their sum.
    """
    return a + b


@tool
def get_weather(location: str) -> str:
    """Get weather at a location."""
    return "It's sunny."


@tool("get_weather")
def get_the_weather(location: str) -> str:
    """Get the weather at a location."""
    return "It's sunny."


def conversations() -> Iterator[tuple[Any, Any, str]]:
    """Model (perhaps with tools), input, and the answer that is learnt."""
    llm = ChatMacaw(model="m", hints=False)
    magic, no_args = standard.magic_function, standard.magic_function_no_args
    for text in ("Hello", "Hey", "hi", "Write me 2 haikus. Only include the haikus."):
        yield llm, text, "Hello there, I am a parrot."
    yield llm, [HumanMessage("hello", name="example_user")], "Hello there."
    yield llm, [HumanMessage("hello"), AIMessage("hello"), HumanMessage("how are you")], "I am fine."
    twice = [m for m in (SystemMessage("hello"), HumanMessage("hello"), AIMessage("hello")) for _ in range(2)]
    yield llm, [*twice, HumanMessage("how are you")], "I am fine."
    for joke in (
        "Tell me a joke about cats.",
        "Give me a joke about cats, include the punchline.",
        "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. "
        "Return nothing other than JSON.",
    ):
        yield llm, joke, JOKE
    yield llm, "Give me the setup to a joke about cats, no punchline.", json.dumps({"setup": "Why did the cat sit?"})
    three = "What is the value of magic_function(3)? Use the tool."
    yield llm.bind_tools([magic]), three, call("magic_function", input=3)
    none = "What is the value of magic_function_no_args()? Use the tool."
    yield llm.bind_tools([no_args]), none, call("magic_function_no_args")
    yield llm.bind_tools([magic, get_weather]), "Hello!", call("magic_function", input=1)
    prompt = ChatPromptTemplate.from_messages([("human", "Hello. Please respond in the style of {answer_style}.")])
    greet = (prompt | llm | StrOutputParser()).as_tool(
        name="greeting_generator", description="Generate a greeting in a particular style of speaking."
    )
    yield (
        llm.bind_tools([greet]),
        "Using the tool, generate a Pirate greeting.",
        call("greeting_generator", answer_style="Pirate"),
    )
    examples = tool_example_to_messages(
        "What is 1 + 2",
        [my_adder_tool.args_schema(a=1, b=2)],
        tool_outputs=['{"result": 3}'],
        ai_response='{"result": 3}',
    )
    yield llm.bind_tools([my_adder_tool]), [*examples, HumanMessage("What is 3 + 4")], call("my_adder_tool", a=3, b=4)
    weather = HumanMessage("What is the weather in San Francisco, CA?")
    asked = call("get_weather", location="San Francisco, CA")
    yield llm.bind_tools([get_the_weather]), [weather], asked
    request = {"name": "get_weather", "args": {"location": "San Francisco, CA"}, "id": "1", "type": "tool_call"}
    answered = [weather, AIMessage("", tool_calls=[request]), ToolMessage("It's sunny.", tool_call_id="1")]
    yield llm.bind_tools([get_the_weather]), answered, "It is sunny in San Francisco."
    for name, text in (
        ("你好啊集团", "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company"),
        ("こんにちは株式会社", "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company"),
    ):
        written = call("unicode_customer", customer_name=name, description="A company")
        yield llm.bind_tools([standard.unicode_customer]), [HumanMessage(text)], written


def save_capable_model(folder: Path) -> None:
    """Train and write it, as a hub model would be.

    Raises:
        AssertionError: It has not learnt its answers.
    """
    tokenizer = _untrained_tokenizer()
    texts = [(_prompt(model, input, tokenizer), answer + END) for model, input, answer in conversations()]
    tokenizer = _tokenizer("".join(pair) for pair in texts)
    pairs = [
        (tokenizer.encode(p, add_special_tokens=False), tokenizer.encode(a, add_special_tokens=False)) for p, a in texts
    ]
    model = make_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        head_dim=24,
        num_key_value_heads=4,
        initializer_range=0.05,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        bos_token_id=None,
    )
    _train(model, pairs)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: Any, pairs: list[tuple[list[int], list[int]]]) -> None:
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(pairs):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(NUM_STEPS):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20)
            output = model(input_ids=ids, labels=labels)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            shown = labels[:, 1:] != -100
            if (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[shown].all() and output.loss < 0.02:
                break
        else:
            raise AssertionError(f"After {NUM_STEPS} steps the loss is {output.loss:.3f}: answers are not learnt.")
    model.eval()


def _prompt(model: Any, input: Any, tokenizer: Any) -> str:
    bound: dict[str, Any] = dict(model.kwargs) if isinstance(model, RunnableBinding) else {}
    llm: Any = model.bound if isinstance(model, RunnableBinding) else model
    body = request_body(llm._get_request_payload(input, **bound))
    return prompt_text(ChatCompletionRequest.model_validate_json(json.dumps(body)), {}, tokenizer)


def _untrained_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer([])


def _tokenizer(texts: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose words are those of the conversations, which makes these short."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast
