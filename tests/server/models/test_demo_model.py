"""macaw-demo: what it learns from, how it is made, and what it can do."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from langchain_macaw.demo import CHUNK_CHARACTERS, INSTRUCTIONS, MAX_CHUNKS, NOTES
from macaw_server.models import make_demo
from macaw_server.models.demo_subjects import SUBJECTS
from macaw_server.models.demo_text import NOT_SAID, SYSTEM, Note, combine, make_chat, make_document, make_note
from macaw_server.models.loader import DEMO_FOLDER
from macaw_server.models.make_demo import BATCH_TOKENS, POOL_BATCHES, Lessons, train
from macaw_server.serve import LocalServer

UNSEEN = range(10**9, 10**9 + 40)  # seeds of notes that training does not draw: its seeds begin at 0


def names(text: str) -> set[str]:
    """Words that are made up or numbers, so that they can only come from the note."""
    return set(re.findall(r"\b(?:\d[\d.,]*\d|\d|[A-Z][a-z]+)\b", text))


def test_answers_say_only_what_the_note_says() -> None:
    for seed in range(500):
        note = make_note(random.Random(seed))
        said = names(note.text)
        for answer in (note.summary, note.subject, *(answer for _, answer in note.questions)):
            first = answer.split()[0]  # has a capital at the beginning of a sentence, whatever it is
            assert names(answer) - {first} <= said, (note, answer)
        assert not any("{" in text for text in (note.text, note.summary, *sum(note.questions, ())))
        assert len(note.questions) + len(note.unanswered) == 5 or not note.unanswered


def test_every_sentence_of_every_subject_can_be_said() -> None:
    said = " ".join(make_note(random.Random(seed)).text for seed in range(5000))
    for subject in SUBJECTS:
        for values in (*subject.slots.values(), subject.trouble, subject.fine):
            for value in values.split("; "):
                assert value in said


def test_summaries_of_several_notes() -> None:
    notes = [Note(f"the ship {name}", "", f"The ship {name} sailed.", False, ()) for name in "ABCDE"]
    assert combine(notes[:1]) == "The notes are about the ship A. All is well."
    assert combine(notes[:2]) == "The notes are about the ship A and the ship B. All is well."
    late = Note("the mill", "", "The mill is late.", True, ())
    whole = combine([*notes[:4], late])
    assert whole == (
        "The notes are about the ship A, the ship B, the ship C and other things. The first trouble: The mill is late."
    )


def test_chats_can_be_rendered_and_do_not_change() -> None:
    words = [" one", " two", " three"]
    for seed in range(300):
        chat = make_chat(random.Random(seed), words, 0.1)
        assert chat == make_chat(random.Random(seed), words, 0.1)
        roles = [message["role"] for message in chat if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in chat)


def test_the_demo_asks_what_the_model_has_learnt() -> None:
    text = NOTES.read_text(encoding="utf-8")
    assert text == make_document(1, MAX_CHUNKS), "made by demo_text; write it again"
    assert all(len(note) <= CHUNK_CHARACTERS for note in text.split("\n\n"))
    assert set(re.split(r"(?<=\.) ", INSTRUCTIONS)) <= set(SYSTEM)


def test_batches_are_the_same_for_the_same_step() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    lessons, again = Lessons(tokenizer), Lessons(tokenizer)
    again.batch(3 * POOL_BATCHES)  # wherever training begins
    for step in (0, 1, POOL_BATCHES + 2):
        batch, same = lessons.batch(step), again.batch(step)
        assert torch.equal(batch.tokens, same.tokens)
        assert torch.equal(batch.weights, same.weights)
        real = (batch.tokens != tokenizer.pad_token_id).sum().item()
        assert BATCH_TOKENS / 2 < real < 2 * BATCH_TOKENS
        answers = tokenizer.decode(batch.tokens.roll(-1, dims=1)[batch.weights == 1])
        assert "<|im_end|>" in answers
        assert "user" not in answers.replace("users", ""), "what is asked is not learnt as an answer"


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_demo, "BATCH_TOKENS", 2048)
    monkeypatch.setattr(make_demo, "CHECKPOINT_STEPS", 2)
    straight = train(tmp_path / "straight", 4)
    batch = Lessons.batch

    def interrupted(self: Lessons, step: int) -> make_demo.Batch:
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Lessons, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed", 4)
    assert train(tmp_path / "resumed", 4) == straight
    assert train(tmp_path / "other", 5) != straight


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with (
        LocalServer(model="macaw-demo", dtype="float32", max_model_len=2048) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        yield client


def ask(client: OpenAI, text: str, max_tokens: int = 128) -> str:
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}]
    choice = client.chat.completions.create(
        model="macaw-demo",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
    ).choices[0]
    assert choice.finish_reason == "stop", choice
    return str(choice.message.content)


def test_it_summarises_notes_that_it_has_not_seen(client: OpenAI) -> None:
    notes = [make_note(random.Random(seed), num_facts=4) for seed in UNSEEN]
    summaries = [ask(client, f"Summarise this part:\n\n{note.text}") for note in notes]
    right = sum(summary == note.summary for summary, note in zip(summaries, notes, strict=True))
    assert right >= 0.8 * len(notes), summaries


def test_it_answers_questions(client: OpenAI) -> None:
    right = asked = 0
    for seed in UNSEEN:
        note = make_note(random.Random(seed), num_facts=2)
        questions = [*note.questions, *((question, NOT_SAID) for question in note.unanswered[:1])]
        for question, answer in questions:
            asked += 1
            right += ask(client, f"Context:\n{note.text}\n\nQuestion: {question}\nAnswer:") == answer
    assert right >= 0.55 * asked


def test_it_combines_summaries(client: OpenAI) -> None:
    right = 0
    for seed in UNSEEN:
        rng = random.Random(seed)
        notes = [make_note(rng) for _ in range(2)]
        bullets = "\n".join(f"- {note.summary}" for note in notes)
        right += ask(client, f"Combine these summaries into one:\n\n{bullets}") == combine(notes)
    assert right >= 0.45 * len(UNSEEN)
