"""Questions to ask: for the skills that this project ships adapters for, and for any other."""

SKILLS = {
    "json": (
        "What is the capital of Italy?",
        "How many legs does a spider have?",
        "What colour is a ripe banana?",
        "Which planet is closest to the sun?",
    ),
    "sql": (
        "How many customers live in Oslo?",
        "List the names of all employees.",
        "Which products cost more than 20?",
        "Delete the orders from 2019.",
    ),
    "pirate": (
        "How do I make tea?",
        "What should I wear in the rain?",
        "How do I get to the station?",
        "Tell me about the sea.",
    ),
    "sentiment": (
        "The waiter was rude and the soup was cold.",
        "A wonderful film, I laughed all evening.",
        "The room was clean and the bed was soft.",
        "It broke after two days.",
    ),
}
GENERAL = (
    "How do I make tea?",
    "What is the capital of France?",
    "Tell me about the sea.",
    "Why is the sky blue?",
)
FILLER = "The following note is background and needs no answer. "


def prompt_for(skill: str, number: int, own: list[str]) -> str:
    """Prompt number `number` of a skill; `own`, when there are any, are used in turn instead."""
    choices = own or SKILLS.get(skill, GENERAL)
    return choices[number % len(choices)]


def lengthen(prompt: str, words: int) -> str:
    """The prompt with as much in front of it that it has about `words` words; unchanged when it has more."""
    missing = words - len(prompt.split())
    filler = (FILLER * (max(missing, 0) // len(FILLER.split()) + 1)).split()[: max(missing, 0)]
    return " ".join([*filler, prompt]) if filler else prompt
