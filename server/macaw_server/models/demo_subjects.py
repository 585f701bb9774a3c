"""What the notes of `demo_text` are about: six subjects, with the sentences, questions and summaries of each."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """One thing that a note says: sentences that say it, questions for it, and the answer; with ``{slots}``."""

    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


class Subject(NamedTuple):
    """A kind of note.

    Attributes:
        name: What the note is about, as a noun phrase.
        leads: First sentences.
        facts: What else is said, in any order.
        outcome: The fact with which the summary ends.
        summary: Of the note, in one sentence.
        slots: What may stand in each slot of this subject, separated by "; ". `person`, `place`, numbers and dates
            are common to all.
        trouble: Outcomes that are, separated by "; ".
        fine: Outcomes that are not trouble.
    """

    name: str
    leads: tuple[str, ...]
    facts: tuple[Fact, ...]
    outcome: Fact
    summary: str
    slots: dict[str, str]
    trouble: str
    fine: str


SUBJECTS = (
    Subject(
        "the {kind} in {place}",
        (
            "The {kind} in {place} is the work of {person} and a crew of {number}.",
            "{person} leads the work on the {kind} in {place}.",
            "Work on the {kind} in {place} is led by {person}.",
        ),
        (
            Fact(
                ("It began in {month} {year}.", "The first stone was laid in {month} {year}."),
                ("When did the work begin?", "When did it start?"),
                "The work began in {month} {year}.",
            ),
            Fact(
                (
                    "The cost is {money} crowns.",
                    "The council pays {money} crowns for it.",
                    "It will cost {money} crowns.",
                ),
                ("How much does it cost?", "What is the cost?"),
                "It costs {money} crowns.",
            ),
            Fact(
                (
                    "It is built of {material}.",
                    "The walls are made of {material}.",
                    "Most of it is made of {material}.",
                ),
                ("What is it made of?", "What is it built of?"),
                "It is made of {material}.",
            ),
            Fact(
                ("It will serve {people}.", "When it is done, {people} will use it."),
                ("Who will use it?", "Whom will it serve?"),
                "It will serve {people}.",
            ),
        ),
        Fact(
            ("The work {outcome}.", "At present the work {outcome}.", "The last report says that the work {outcome}."),
            ("How is the work going?", "What is the state of the work?"),
            "The work {outcome}.",
        ),
        "The {kind} in {place}, led by {person}, {outcome}.",
        {
            "kind": (
                "bridge; library; school; hospital; town hall; harbour; tunnel; theatre; market hall; water tower; "
                "railway station; museum; swimming pool; lighthouse; mill; fire station"
            ),
            "material": "red brick; grey stone; oak and glass; steel; concrete; pine wood; old timber",
            "people": (
                "the whole valley; two villages; children and teachers; travellers from the north; the people of the "
                "old town; farmers and traders; about a thousand families"
            ),
        },
        "is late because of heavy rain; is late because the steel has not arrived; has stopped because the "
        "money ran out; is late because two cranes broke; has stopped because old graves were found",
        "is on time; is almost done; is finished; is ahead of its plan; will be done before winter",
    ),
    Subject(
        "the {kind} of {place}",
        (
            "The {kind} of {place} met on {day} {month} with {number} members.",
            "On {day} {month} the {kind} of {place} met; {number} members came.",
        ),
        (
            Fact(
                ("{person} was in the chair.", "The meeting was chaired by {person}.", "{person} led the meeting."),
                ("Who led the meeting?", "Who was in the chair?"),
                "{person} led the meeting.",
            ),
            Fact(
                ("The longest debate was about {topic}.", "Most of the evening went to {topic}."),
                ("What was debated?", "What was the longest debate about?"),
                "The debate was about {topic}.",
            ),
            Fact(
                ("The next meeting is in {place2}.", "They will meet again in {place2}."),
                ("Where is the next meeting?", "Where will they meet again?"),
                "The next meeting is in {place2}.",
            ),
            Fact(
                ("The treasurer reported {money} crowns in the account.", "There are {money} crowns in the account."),
                ("How much money is in the account?", "How much money do they have?"),
                "There are {money} crowns in the account.",
            ),
        ),
        Fact(
            ("In the end they {outcome}.", "They {outcome}.", "After a vote they {outcome}."),
            ("What did they decide?", "What was decided?"),
            "They {outcome}.",
        ),
        "The {kind} of {place} met on {day} {month} and {outcome}.",
        {
            "kind": (
                "council; garden club; school board; fishers' union; choir; chess club; farmers' guild; history "
                "society; rowing club; parents' group; bakers' guild; tenants' union"
            ),
            "topic": (
                "the price of water; the noise at night; a new road; the old trees; who may use the hall; the colour "
                "of the roof; bicycles in the park; the summer fair"
            ),
        },
        "could not agree on anything; had to stop early because the lights failed; put off every decision "
        "because papers were missing",
        "voted to buy a new boat; agreed to plant forty trees; chose a new treasurer; voted to lower the "
        "fees; decided to repair the roof first; agreed to open on Sundays",
    ),
    Subject(
        "the test of {kind} in {place}",
        (
            "In the laboratory of {place}, {person} ran a test of {kind}.",
            "{person} ran a test of {kind} in the laboratory of {place}.",
        ),
        (
            Fact(
                ("{count} samples were measured.", "The test used {count} samples.", "There were {count} samples."),
                ("How many samples were there?", "How many samples were measured?"),
                "There were {count} samples.",
            ),
            Fact(
                ("The oven was set to {degrees} degrees.", "Everything was done at {degrees} degrees."),
                ("How hot was it?", "At what temperature was it done?"),
                "It was done at {degrees} degrees.",
            ),
            Fact(
                ("It took {number} days.", "After {number} days the test was over.", "The test ran for {number} days."),
                ("How long did it take?", "How many days did the test run?"),
                "The test took {number} days.",
            ),
            Fact(
                ("The {tool} was borrowed from {place2}.", "A {tool} came from {place2} for it."),
                ("What was borrowed?", "What came from elsewhere?"),
                "The {tool} came from {place2}.",
            ),
        ),
        Fact(
            ("The result: it {outcome}.", "In the end it {outcome}.", "The report says that it {outcome}."),
            ("What was the result?", "How did the test end?"),
            "It {outcome}.",
        ),
        "The test of {kind} in {place} by {person} {outcome}.",
        {
            "kind": (
                "copper wire; glass lenses; paper bags; wheat seeds; clay pots; rubber tyres; salt water; solar "
                "cells; wool rope; lamp oil; steel springs; candle wax; cotton thread; blue paint"
            ),
            "tool": "microscope; balance; pump; camera; clock; furnace",
        },
        "failed because the samples were wet; failed because the power went out; must be done again because "
        "the scale was wrong",
        "showed no difference at all; gave twice the expected strength; worked at the first try; confirmed "
        "what theory had said; gave better results than last year",
    ),
    Subject(
        "version {version} of {product}",
        (
            "Version {version} of {product}, a {kind}, came out in {month} {year}.",
            "In {month} {year} version {version} of {product} came out; {product} is a {kind}.",
        ),
        (
            Fact(
                ("{person} maintains it.", "It is maintained by {person}.", "{person} is in charge of it."),
                ("Who maintains it?", "Who is in charge of it?"),
                "{person} maintains it.",
            ),
            Fact(
                ("It adds {feature}.", "New in it: {feature}.", "The main change is {feature}."),
                ("What is new?", "What does it add?"),
                "It adds {feature}.",
            ),
            Fact(
                ("{count} people downloaded it in the first week.", "In the first week it had {count} users."),
                ("How many users did it have?", "How many people downloaded it?"),
                "It had {count} users in the first week.",
            ),
            Fact(
                ("The office in {place} wrote most of it.", "Most of it was written in {place}."),
                ("Where was it written?", "Which office wrote it?"),
                "Most of it was written in {place}.",
            ),
        ),
        Fact(
            ("So far it {outcome}.", "Users say that it {outcome}.", "The first reports say that it {outcome}."),
            ("What do users say?", "How does it do so far?"),
            "It {outcome}.",
        ),
        "Version {version} of {product}, maintained by {person}, {outcome}.",
        {
            "kind": (
                "database; text editor; compiler; web server; map viewer; music player; photo library; mail client; "
                "spell checker; calendar; search engine; drawing program"
            ),
            "feature": (
                "dark colours; a faster index; search in old files; support for large pages; a better cache; undo for "
                "every step; a command for backups; keys that can be changed; reports as tables"
            ),
        },
        "loses data when the disk is full; crashes on long names; is slower than before because of a lock; "
        "does not start on old machines",
        "runs well; is twice as fast as before; uses half the memory; has no known faults; is easy to learn",
    ),
    Subject(
        "the ship {ship}",
        (
            "The ship {ship} left {place} for {place2} on {day} {month}.",
            "On {day} {month} the ship {ship} sailed from {place} to {place2}.",
        ),
        (
            Fact(
                ("Her captain is {person}.", "{person} is her captain.", "She sails under Captain {person}."),
                ("Who is the captain?", "Who commands the ship?"),
                "The captain is {person}.",
            ),
            Fact(
                ("She carries {cargo}.", "Her cargo is {cargo}.", "In her hold there is {cargo}."),
                ("What does the ship carry?", "What is the cargo?"),
                "She carries {cargo}.",
            ),
            Fact(
                ("The voyage takes {number} days.", "She needs {number} days for the way."),
                ("How long does the voyage take?", "How many days does it take?"),
                "The voyage takes {number} days.",
            ),
            Fact(
                ("The crew has {count} hands.", "There are {count} sailors on board."),
                ("How many sailors are on board?", "How large is the crew?"),
                "There are {count} sailors on board.",
            ),
        ),
        Fact(
            ("She {outcome}.", "The last letter says that she {outcome}.", "News came that she {outcome}."),
            ("What happened to the ship?", "What is the news of the ship?"),
            "The ship {outcome}.",
        ),
        "The ship {ship} sailed from {place} to {place2} under {person} and {outcome}.",
        {
            "cargo": (
                "salt and cloth; wheat; coal; iron tools; tea and sugar; wine in barrels; books and paper; timber; "
                "dried fish; wool; machine parts; oranges"
            ),
        },
        "lost a mast in a storm; waits in port because the rudder broke; turned back because of ice; ran onto "
        "a sand bank",
        "arrived a day early; arrived safely; made the way in record time; sold all of her cargo",
    ),
    Subject(
        "the {kind} near {place}",
        (
            "{person} studies the {kind} near {place}.",
            "The {kind} near {place} have been studied by {person} for {number} years.",
        ),
        (
            Fact(
                ("{count} of them were counted in {month}.", "In {month} there were {count} of them."),
                ("How many were counted?", "How many of them are there?"),
                "{count} of them were counted.",
            ),
            Fact(
                ("They feed on {food}.", "Their food is {food}.", "Mostly they eat {food}."),
                ("What do they eat?", "What do they feed on?"),
                "They eat {food}.",
            ),
            Fact(
                ("They nest in {home}.", "Their home is {home}.", "At night they sleep in {home}."),
                ("Where do they live?", "Where do they nest?"),
                "They live in {home}.",
            ),
            Fact(
                ("In winter they move to {place2}.", "Some of them go to {place2} when it is cold."),
                ("Where do they go in winter?", "Where do they move?"),
                "In winter they move to {place2}.",
            ),
        ),
        Fact(
            ("This year they {outcome}.", "The study found that they {outcome}.", "It seems that they {outcome}."),
            ("How are they doing?", "What did the study find?"),
            "They {outcome}.",
        ),
        "The {kind} near {place}, studied by {person}, {outcome}.",
        {
            "kind": (
                "macaws; otters; grey owls; wild horses; storks; bats; beavers; seals; red foxes; cranes; turtles; "
                "herons; honey bees; swallows"
            ),
            "food": "fruit and nuts; small fish; seeds; grass; insects; roots and bark; clover; mice",
            "home": "old barns; hollow trees; reeds by the river; caves; the cliffs; holes in the bank",
        },
        "are fewer because the marsh dried out; suffer because of the new road; left early because of a fire",
        "have doubled in number; raised more young than ever; have come back after ten years; are doing well",
    ),
)
