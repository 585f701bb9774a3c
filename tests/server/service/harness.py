"""A service over a scripted engine: every token is known beforehand, and time is the test's."""

import asyncio
import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from macaw.protocol import ProgramRequest
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenLogprobs
from macaw_server.service import ProgramService, ServedModel, ServiceConfig, Tenant
from macaw_server.service.tenants import ANONYMOUS

DOCS = Path(__file__).parents[3] / "docs"
MODEL = "tiny/scripted"
MAX_MODEL_LEN = 400
EOS = 1
OTHER = Tenant("other", "salt-of-other")
CHAIN = {"Draft": "a draft", "Polish": "a polished text"}


@cache
def tokenizer():
    """Byte-level BPE, trained on our own documentation."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<|role|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train([str(path) for path in sorted(DOCS.glob("*.md"))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|role|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
    )
    return fast


def encode(text):
    return tokenizer().encode(text, add_special_tokens=False)


def chat_prompt(*contents):
    """The text of a conversation of user messages, as the model sees it."""
    return "".join(f"<|role|>user\n{content}</s>" for content in contents) + "<|role|>assistant\n"


class ScriptedEngine:
    """Says what `script` says, one token per request and step; where that says nothing, something random.

    Steps follow each other on the event loop, unless the engine is held: then `step` makes one.
    """

    def __init__(self, script=None, held=False, ahead_rows=64):
        self.info = EngineInfo(
            400, MAX_MODEL_LEN, 16, 64, 4096, 10**6, "cpu", "float32", "native", frozenset({EOS}), ahead_rows
        )
        self.status = "running"
        self.script = script or {}
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.aborts: list[tuple[list[str], bool]] = []
        self.let_gos: list[str] = []
        self.held = held
        self._active = {}
        self._pumping = False

    async def start(self):
        self.status = "running"

    async def stop(self):
        self.status = "stopped"

    async def stats(self):
        return EngineStats(
            steps=7,
            prompt_tokens=100,
            cached_tokens=40,
            computed_tokens=60,
            preemptions=3,
            step_time_ms={"fixed": 2.5},
        )

    def submit(self, request, on_output):
        assert request.request_id not in self._active
        assert request.prompt_ids
        self.requests.append(request)
        self._active[request.request_id] = (request, on_output, self._tokens(request))
        self._pump()

    def abort(self, request_ids, *, keep_pages=False):
        self.aborts.append((list(request_ids), keep_pages))
        self.aborted += [request_id for request_id in request_ids if self._active.pop(request_id, None)]

    def let_go(self, holders):
        self.let_gos += holders

    @property
    def num_live(self):
        return len(self._active)

    @property
    def active(self):
        return list(self._active)

    def prompts(self):
        """The texts that the engine was asked to go on from."""
        return [tokenizer().decode(request.prompt_ids) for request in self.requests]

    def hold(self):
        self.held = True

    def release(self):
        self.held = False
        self._pump()

    def step(self):
        for request_id in self.active:
            request, on_output, tokens = self._active[request_id]
            if request.prefill_only:
                del self._active[request_id]
                on_output(EngineOutput(request_id, finish_reason="length", cached_tokens=0))
                continue
            first = not request.output_ids
            token_id = tokens[len(request.output_ids)]
            request.output_ids.append(token_id)
            reason = "stop" if token_id in request.sampling.stop_token_ids else None
            if reason is None and len(request.output_ids) == request.sampling.max_tokens:
                reason = "length"
            if reason is not None:
                del self._active[request_id]
            on_output(
                EngineOutput(
                    request_id,
                    [token_id],
                    self._logprobs(request, token_id),
                    reason,
                    cached_tokens=len(request.prompt_ids) // 2 if first else None,
                )
            )

    def say(self, request_id, tokens):
        """Override what a request will be answered."""
        request, on_output, _ = self._active[request_id]
        self._active[request_id] = (request, on_output, tokens)

    def deliver(self, request_id, token_ids, finish_reason=None, cached_tokens=None):
        """What a step did, said by hand."""
        _, on_output, _ = self._active[request_id]
        if finish_reason is not None:
            del self._active[request_id]
        on_output(EngineOutput(request_id, token_ids, None, finish_reason, cached_tokens))

    def fail(self, code, message, request_ids=None):
        for request_id in request_ids or self.active:
            _, on_output, _ = self._active.pop(request_id)
            on_output(EngineOutput(request_id, error=(code, message)))

    def answer(self, request):
        """The tokens that a request will get, stop token included."""
        tokens = self._tokens(request)
        stop = next((i for i, t in enumerate(tokens) if t in request.sampling.stop_token_ids), len(tokens))
        return tokens[: min(stop + 1, request.sampling.max_tokens)]

    def _tokens(self, request):
        prompt = tokenizer().decode(request.prompt_ids)
        for marker, text in self.script.items():
            if marker in prompt:
                return [*encode(text), EOS, *([5] * MAX_MODEL_LEN)]
        seed = 0 if request.sampling.temperature == 0 else request.sampling.seed
        rng = random.Random(f"{request.prompt_ids} {seed}")
        return [rng.randrange(270, len(tokenizer())) for _ in range(MAX_MODEL_LEN)]

    def _logprobs(self, request, token_id):
        if request.sampling.logprobs is None:
            return None
        top = [(token_id, -0.5), (token_id + 1, -1.5), (token_id - 1, -2.5)][: request.sampling.logprobs]
        return [TokenLogprobs(-0.5, top)]

    def _pump(self):
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self):
        self._pumping = False
        if self._active and not self.held:
            self.step()
            self._pump()


def make_service(engine, **config):
    config = {"prefill_ahead": False, **config}
    return ProgramService([ServedModel(MODEL, tokenizer(), engine, 1700000000)], ServiceConfig(**config))


def program(*calls, targets=(), **fields):
    """A program from calls as (id, parts...); a part that starts with ``$`` is a variable."""
    return ProgramRequest.model_validate(
        {
            "calls": [call(*entry) for entry in calls],
            "targets": [{"variable": name} for name in targets],
            **fields,
        }
    )


def call(call_id, *parts, **request):
    """A call on the wire, whose output is ``id.out``."""
    content = [
        {"type": "variable", "variable": part[1:]} if part.startswith("$") else {"type": "text", "text": part}
        for part in parts
    ]
    message = {"role": "user", "content": content}
    return {
        "id": call_id,
        "output": f"{call_id}.out",
        "request": {"messages": [message], "max_tokens": 20, **request},
    }


async def submit(service, request, tenant=ANONYMOUS, **kwargs):
    return await service.submit(tenant, request, **kwargs)


async def until(condition):
    """Let the event loop work until something holds; the test's own timeout is the bound."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def chain(**fields):
    return program(("draft", "Draft it."), ("polish", "Polish: ", "$draft.out"), targets=["polish.out"], **fields)


async def finished(service, request, **kwargs):
    run = await submit(service, request, **kwargs)
    await run.wait()
    return run
