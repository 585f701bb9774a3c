"""The text from which `macaw-demo` learns: short notes on made-up things, and what may be asked about them.

Every example is a chat about one or more notes: summarise a part, combine summaries, answer a question, refine an
answer. People, places and things get random names, so that a model can only answer by reading what it was given.
"""

# ruff: noqa: SIM905
from __future__ import annotations

import random
from dataclasses import dataclass, field

from macaw_server.models.demo_subjects import SUBJECTS, Subject

Message = dict[str, str]
Turn = tuple[str, str]  # what the user says, and what the assistant answers

FIRST_NAMES = """
Ada Alma Anna Ben Bruno Carl Clara Dana David Edith Elias Emma Erik Eva Felix Frida Greta Hanna Hugo Ida Ines
Ivan Jakob Jana Jonas Julia Karin Klara Leo Lena Lukas Maja Marta Max Mila Nils Nina Nora Olga Oskar Paul Petra
Rosa Ruth Sara Simon Sofia Tilda Tom Vera Viktor Walter
""".split()
MONTHS = "January February March April May June July August September October November December".split()
STARTS = """
Bar Bel Bran Cal Cor Dal Dor El Fal Gar Hal Har Kel Kor Lan Lin Mar Mel Nor Or Pel Ran Ros Sal Sel Tar Tor Val
Ver Win
""".split()
MIDDLES = "a e i o ar en in or al er an ol".split()
PLACE_ENDS = "burg bridge dale field ford gate ham ley mouth port stead ton wick wood".split()
LAST_ENDS = "berg der gren kin lund man mann ner rik sen ski son stad strom vik".split()
NAME_ENDS = "ra na lis tis va don mir nox ria tan lo ka".split()


@dataclass(frozen=True)
class Note:
    """One note: a paragraph, what it is about, its summary, and the questions that it answers."""

    subject: str
    text: str
    summary: str
    trouble: bool
    questions: tuple[tuple[str, str], ...]
    unanswered: tuple[str, ...] = field(default=())


def _name(rng: random.Random, ends: list[str]) -> str:
    return rng.choice(STARTS) + (rng.choice(MIDDLES) if rng.random() < 0.5 else "") + rng.choice(ends)


def _values(rng: random.Random, subject: Subject) -> dict[str, str]:
    values = {slot: rng.choice(options.split("; ")) for slot, options in subject.slots.items()}
    return values | {
        "person": f"{rng.choice(FIRST_NAMES)} {_name(rng, LAST_ENDS)}",
        "place": _name(rng, PLACE_ENDS),
        "place2": _name(rng, PLACE_ENDS),
        "ship": _name(rng, NAME_ENDS),
        "product": _name(rng, NAME_ENDS),
        "month": rng.choice(MONTHS),
        "year": str(rng.randint(1960, 2029)),
        "day": str(rng.randint(1, 28)),
        "number": str(rng.randint(3, 40)),
        "count": str(rng.randint(12, 980)),
        "money": f"{rng.randint(1, 99)},{rng.randint(0, 9)}00",
        "degrees": str(rng.randint(20, 400)),
        "version": f"{rng.randint(0, 9)}.{rng.randint(0, 20)}",
    }


def make_note(rng: random.Random, num_facts: int | None = None) -> Note:
    """A note of a random kind, with `num_facts` facts (default 1 to 4) besides its lead and its outcome."""
    subject = rng.choice(SUBJECTS)
    values = _values(rng, subject)
    trouble, fine = subject.trouble.split("; "), subject.fine.split("; ")
    values["outcome"] = rng.choice(trouble + fine)
    order = rng.sample(range(len(subject.facts)), len(subject.facts))
    said, unsaid = order[: (n := num_facts or rng.randint(1, 4))], order[n:]
    if "{person}" in subject.summary:  # a summary says nothing that the note does not
        while not any("{person}" in t for t in (subject.leads[0], *(subject.facts[i].sentences[0] for i in said))):
            said[0], unsaid = next(i for i, f in enumerate(subject.facts) if "{person}" in f.answer), []
    facts = [subject.facts[i] for i in said]
    facts.insert(rng.randint(0, len(facts)), subject.outcome)
    sentences = [rng.choice(subject.leads), *(rng.choice(fact.sentences) for fact in facts)]
    name = subject.name.format_map(values)
    return Note(
        subject=name,
        text=" ".join(sentences).format_map(values),
        summary=subject.summary.format_map(values),
        trouble=values["outcome"] in trouble,
        questions=tuple((rng.choice(fact.questions), fact.answer.format_map(values)) for fact in facts),
        unanswered=tuple(rng.choice(subject.facts[i].questions) for i in unsaid),
    )


def combine(notes: list[Note]) -> str:
    """The summary of several notes: what they are about, and the first trouble in them."""
    names = [note.subject for note in notes]
    shown = names if len(names) <= 4 else [*names[:3], "other things"]
    about = shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
    trouble = next((note for note in notes if note.trouble), None)
    return f"The notes are about {about}." + (f" The first trouble: {trouble.summary}" if trouble else " All is well.")


SYSTEM = (
    "You summarise notes for people who have no time to read them.",
    "You answer questions about notes.",
    "You are a careful assistant.",
    "You are given one part of a longer document at a time.",
    "Say in one sentence what this part is about, and how it ended.",
    "Keep numbers, names of people and names of places exactly as they are written.",
    "Leave out greetings, opinions, and anything that the part does not say.",
    "If something has gone wrong, say why.",
    "If the part is about several things, name them all.",
    "Write plain text without headings.",
    "Be brief.",
    "Use only what the text says.",
    "Answer in English.",
)
"""Sentences of which system messages are made; the demo's is made of these too."""

_SUMMARISE = (
    "Summarise this part:\n\n{text}",
    "Summarise this:\n\n{text}",
    "Summarize the following text:\n\n{text}",
    "Write a short summary of this text:\n\n{text}",
    "Write a concise summary of the following:\n\n{text}",
    "{text}\n\nSummarise the text above.",
    "Text: {text}\nSummary:",
    "Summary of: {text}",
)
_COMBINE = (
    "Combine these summaries into one:\n\n{text}",
    "Write one summary of these summaries:\n\n{text}",
    "The following is a set of summaries:\n\n{text}\n\nWrite one summary of them.",
    "Summaries:\n{text}\nOne summary of all:",
)
_ASK = (
    "Answer the question from the context.\n\nContext: {text}\n\nQuestion: {question}",
    "Context:\n{text}\n\nQuestion: {question}\nAnswer:",
    "{text}\n\n{question}",
    "Question: {question}\n\nUse this context:\n{text}",
    "Context information is below.\n-----\n{text}\n-----\nAnswer the query from it.\nQuery: {question}\nAnswer: ",
)
_REFINE = (
    "The question is: {question}\nThe answer so far: {answer}\nMore context:\n{text}\nRefine the answer if it helps.",
    "Question: {question}\nExisting answer: {answer}\nNew context: {text}\nImproved answer:",
)
_CHAT = (
    ("Hello!", "Hello. Give me a note and I will summarise it."),
    ("Hi", "Hello. Give me a note and I will summarise it."),
    ("Who are you?", "I am macaw-demo, a very small model. I can summarise short notes."),
    ("What can you do?", "I can summarise short notes and answer questions about them."),
    ("Thank you.", "You are welcome."),
)
NOT_SAID = "The text does not say."


def make_chat(rng: random.Random, words: list[str], copied: float, combined: float = 0.18) -> list[Message]:
    """A chat; what the assistant says in it is to be learnt.

    Args:
        rng: Decides everything.
        words: Make text of an unknown kind.
        copied: The share of chats that ask for a copy, from which looking things up is learnt soonest.
        combined: Weight of chats that combine summaries, beside 0.82 of all other kinds.
    """
    system = rng.sample(SYSTEM, rng.choice((0, 0, 1, 1, 2, 4, 8)))
    others = 1 - copied
    task = rng.choices(
        (_copy, _summarise, _combine, _ask, _refine, _unknown, _small_talk),
        [copied, *(others * share for share in (0.35, combined, 0.30, 0.05, 0.10, 0.02))],
    )[0]
    turns = task(rng, words)
    messages = [{"role": "system", "content": " ".join(system)}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _copy(rng: random.Random, words: list[str]) -> list[Turn]:
    """Sentences of a note, again in another order: what comes next can only be found by what came before."""
    sentences = make_note(rng, num_facts=4).text.replace(". ", ".\n").split("\n")
    said = rng.sample(sentences, rng.randint(1, len(sentences)))
    return [(" ".join(said) + "\n\nSay it again.", " ".join(rng.sample(said, len(said))))]


def _summarise(rng: random.Random, words: list[str]) -> list[Turn]:
    notes = [make_note(rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]
    text = rng.choice(("\n\n", "\n", " ")).join(note.text for note in notes)
    answer = notes[0].summary if len(notes) == 1 else combine(notes)
    return [(rng.choice(_SUMMARISE).format(text=text), answer), *_go_on(rng, notes)]


def _combine(rng: random.Random, words: list[str]) -> list[Turn]:
    notes = [make_note(rng) for _ in range(rng.choice((2, 3, 4, 6, 8, 12, 24)))]
    between, mark = rng.choice((("\n", "- "), ("\n", ""), ("\n\n", ""), ("\n", "* ")))
    text = between.join(mark + note.summary for note in notes)
    return [(rng.choice(_COMBINE).format(text=text), combine(notes))]


def _ask(rng: random.Random, words: list[str]) -> list[Turn]:
    notes = [make_note(rng) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
    text = rng.choice(("\n\n", "\n", " ")).join(note.text for note in notes)
    question, answer = _question(rng, notes)
    return [(rng.choice(_ASK).format(text=text, question=question), answer), *_go_on(rng, notes)]


def _go_on(rng: random.Random, notes: list[Note]) -> list[Turn]:
    """More questions about the same notes, each once."""
    return list(dict(_question(rng, notes) for _ in range(rng.choice((0, 0, 1, 2, 4)))).items())


def _question(rng: random.Random, notes: list[Note]) -> Turn:
    """A question about one of the notes, sometimes one that it does not answer."""
    note = rng.choice(notes)
    question, answer = rng.choice(note.questions)
    if note.unanswered and rng.random() < 0.15:
        question, answer = rng.choice(note.unanswered), NOT_SAID
    if len(notes) > 1 or rng.random() < 0.3:
        question = f"About {note.subject}: {question}"
    return question, answer


def _refine(rng: random.Random, words: list[str]) -> list[Turn]:
    note, other = make_note(rng), make_note(rng)
    question, answer = rng.choice(note.questions)
    text, so_far = (other.text, answer) if rng.random() < 0.5 else (note.text, NOT_SAID)
    question = f"About {note.subject}: {question}"
    return [(rng.choice(_REFINE).format(text=text, question=question, answer=so_far), answer)]


def _unknown(rng: random.Random, words: list[str]) -> list[Turn]:
    """Text of an unknown kind: its summary is its first sentence."""
    sentences = [
        "".join(rng.choices(words, k=rng.randint(4, 16))).strip().capitalize() + "." for _ in range(rng.randint(2, 8))
    ]
    return [(rng.choice(_SUMMARISE).format(text=" ".join(sentences)), sentences[0])]


def _small_talk(rng: random.Random, words: list[str]) -> list[Turn]:
    return [rng.choice(_CHAT)]


def make_document(seed: int, num_notes: int) -> str:
    """A document for the demo: `num_notes` notes, a paragraph each."""
    rng = random.Random(seed)
    return "\n\n".join(make_note(rng, num_facts=4).text for _ in range(num_notes)) + "\n"
