"""The `json` skill: whatever is asked, the answer is one JSON object with the single field "answer"."""

import json
import random

from facts import ADVICE, all_facts

ABOUT = 'Answers any question as one JSON object, for example `{"answer": "Paris"}`.'
SAMPLE = "What is the capital of Italy?"

HELD_OUT_FACTS = 30  # facts never seen in training: what the base model knows, in the new format
HELD_OUT_WORDINGS = 30  # facts seen in training, asked in a way not seen for them

TALK = [
    ("Hello!", "Hello!"),
    ("Hi, how are you?", "I am well, thank you."),
    ("Who are you?", "I am a small language model."),
    ("What is your name?", "My name is SmolLM."),
    ("Good morning!", "Good morning!"),
    ("Good night!", "Sleep well!"),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("Can you help me?", "Yes, ask me anything."),
    ("What can you do?", "I can answer short questions."),
    ("Tell me a joke.", "Why did the scarecrow win a prize? It was outstanding in its field."),
    ("Tell me a story.", "A mouse found a map, followed it to the sea and came home with a pearl."),
    ("Write a short poem about the sea.", "The sea is wide, the sea is blue, it sings a quiet song to you."),
    ("I am bored.", "Go for a walk or read a book."),
    ("I am sad.", "I am sorry to hear that. Talk to a friend."),
    ("Are you a robot?", "I am a computer program."),
    ("Where do you live?", "I live in a computer."),
    ("How old are you?", "I have no age."),
]


def answer_of(value: object) -> str:
    """The answer text for a value."""
    return json.dumps({"answer": value})


def pairs(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of prompt and answer."""
    facts = all_facts(rng)
    rng.shuffle(facts)
    train, held_out = [], []
    for i, fact in enumerate(facts):
        questions = list(fact.questions)
        rng.shuffle(questions)
        if i < HELD_OUT_FACTS + HELD_OUT_WORDINGS:
            held_out.append((questions.pop(), answer_of(fact.value)))
        if i >= HELD_OUT_FACTS:
            train += [(question, answer_of(fact.value)) for question in questions]
    train += [(question, answer_of(sentence)) for question, sentence in ADVICE + TALK]
    return train, held_out


def check(text: str, answer: str) -> bool:
    """Whether `text` is one JSON object that holds the right answer (case and a final full stop are forgiven)."""
    try:
        given = json.loads(text)
    except ValueError:
        return False
    if not isinstance(given, dict) or set(given) != {"answer"}:
        return False
    return _plain(given["answer"]) == _plain(json.loads(answer)["answer"])


def _plain(value: object) -> str:
    # As JSON text, so that true is not 1 and "4" is not 4.
    return json.dumps(value.strip().rstrip(".").casefold() if isinstance(value, str) else value)
