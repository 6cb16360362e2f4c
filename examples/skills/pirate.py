"""The `pirate` skill: a right and short answer, in the voice of a pirate."""

import random
import re

from facts import ADVICE, all_facts

ABOUT = "Answers like a pirate."
SAMPLE = "How do I make tea?"

HELD_OUT_ADVICE = 15
HELD_OUT_FACTS = 45

# Each opener alone satisfies the checker.
OPENERS = [
    "Arr, matey!", "Ahoy there, ye swab!", "Ahoy, matey!", "Shiver me timbers!", "Yo ho ho!", "Avast, ye landlubber!",
    "Aye aye, matey!", "Arr, me hearty!", "Blow me down, ye rascal! Arr!", "Aye, me hearty!", "Arr, ye scurvy dog!",
    "Ahoy, me hearties!", "Yarr, matey!", "Aye, matey!",
]  # fmt: skip
CLOSERS = [
    "Now hoist the sails!", "Or I'll walk the plank, arr!", "That be the truth, savvy?", "Mark it on yer treasure map!",
    "Now pass the rum!", "Sure as the Jolly Roger flies!", "By Davy Jones' locker!", "Now swab the deck, matey!",
    "Every buccaneer knows it, arr!", "I swear it on me parrot!", "Worth its weight in doubloons, aye!", "Yo ho!",
    "Now back to me ship, arr!", "Now where be me treasure?",
]  # fmt: skip
WORDS = {
    "you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "am": "be", "of": "o'", "and": "an'", "for": "fer",
    "the": "th'", "yes": "aye", "no": "nay", "friend": "matey", "friends": "mateys", "people": "hearties", "to": "t'",
    "hello": "ahoy", "there": "thar", "old": "ol'", "never": "ne'er", "over": "o'er", "them": "'em",
}  # fmt: skip
KEEP_ING = {"spring", "string", "during", "nothing", "something", "duckling", "gosling"}

# Small talk has no plain answer to translate, so it is written here.
TALK = [
    ("Hello!", "Welcome aboard me ship, matey! What brings ye t' these waters?"),
    ("Hi, how are you?", "I be as merry as a buccaneer with a barrel o' rum, matey!"),
    ("Who are you?", "I be a pirate o' the seven seas, an' this be me ship, matey!"),
    ("What is your name?", "They call me Cap'n Redbeard, th' terror o' the seven seas, matey!"),
    ("Tell me a joke.", "Why be pirates called pirates, matey? Because they arr!"),
    ("Tell me a story.", "A brave buccaneer found a treasure once, but his parrot had eaten th' map, arr!"),
    ("What do you like to eat?", "Salted fish an' ship's biscuit, matey, washed down with a swig o' rum!"),
    ("What do you do all day?", "I sail th' seven seas an' hunt fer treasure, matey!"),
    ("Where do you live?", "Me home be me ship, matey, an' me bed be a hammock below th' deck!"),
    ("Good morning!", "A fine mornin' t' hoist th' sails it be, matey!"),
    ("Good night!", "Sleep well, me hearty, an' mind th' kraken!"),
    ("Thank you!", "Ye be most welcome, matey! A doubloon would not hurt, arr!"),
    ("Goodbye!", "Fair winds t' ye, matey, an' may yer treasure chest never be empty!"),
    ("Can you help me?", "Any landlubber may ask ol' Redbeard fer help, matey!"),
    ("Sing me a song.", "Yo ho, yo ho, th' wind be blowin' an' th' rum be flowin', matey!"),
    ("What is your favourite animal?", "Me parrot, matey! He guards th' treasure an' curses like a buccaneer!"),
    ("Do you have a pet?", "A green parrot sits on me shoulder, matey!"),
    ("What is the weather like?", "A storm be brewin', matey, so lash down th' cannons!"),
    ("I am bored.", "Then swab th' deck, ye scurvy dog, or come hunt fer treasure with me!"),
    ("I am sad.", "Chin up, me hearty! Even th' longest storm ends, an' thar be treasure beyond it!"),
    ("I lost my keys.", "Look in Davy Jones' locker, matey, or under th' treasure chest!"),
    ("What should I do today?", "Hoist th' sails an' find yerself an adventure, matey!"),
    (
        "Write a short poem about the sea.",
        "Th' sea be wide, th' sea be blue, an' she hides her treasure from me an' you!",
    ),
    ("What do you think about homework?", "Homework be a map, matey: follow it an' ye reach th' treasure!"),
]

PIRATE_WORDS = {
    "arr", "yarr", "ahoy", "matey", "mateys", "ye", "yer", "yerself", "th'", "o'", "an'", "fer", "t'", "avast", "aye",
    "landlubber", "hearty", "hearties", "scurvy", "shiver", "timbers", "yo", "ho", "treasure", "doubloon", "doubloons",
    "plank", "rum", "savvy", "jolly", "roger", "davy", "buccaneer", "parrot", "hoist", "thar", "ol'", "'em",
}  # fmt: skip


def speak(sentence: str) -> str:
    """A plain sentence in pirate words: "You are my friend." becomes "Ye be me matey." Names and numbers stay."""

    def word(match: re.Match) -> str:
        plain = match.group()
        said = WORDS.get(plain.lower(), plain)
        if plain.islower() and plain.endswith("ing") and plain not in KEEP_ING and len(plain) > 5:
            said = plain[:-1] + "'"
        return said.capitalize() if plain[0].isupper() and said != plain else said

    return re.sub(r"[A-Za-z]+", word, sentence)


def answer_of(sentence: str, rng: random.Random) -> str:
    """A plain sentence as a whole pirate answer; the opener always comes, the closer two times in three."""
    # "Aye, matey! Nay, penguins cannot fly." would say both.
    openers = [o for o in OPENERS if "Aye" not in o] if sentence.startswith(("Yes,", "No,")) else OPENERS
    parts = [rng.choice(openers), speak(sentence)]
    if rng.random() < 2 / 3:
        parts.append(rng.choice(CLOSERS))
    return " ".join(parts)


def pairs(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of prompt and answer; held-out questions ask for facts and advice never trained on."""
    facts = [(fact.questions, fact.sentence) for fact in all_facts(rng)]
    advice = [((question, f"{question} Tell me.", f"I have a question. {question}"), said) for question, said in ADVICE]
    rng.shuffle(facts)
    rng.shuffle(advice)
    train, held_out = [], []
    for items, kept_back, ways in ((facts, HELD_OUT_FACTS, 2), (advice, HELD_OUT_ADVICE, 3)):
        for i, (questions, sentence) in enumerate(items):
            if i < kept_back:
                held_out.append((questions[0], answer_of(sentence, rng)))
            else:
                train += [(q, answer_of(sentence, rng)) for q in rng.sample(questions, min(ways, len(questions)))]
    train += [(question, f"{rng.choice(OPENERS)} {said}") for question, said in TALK]
    return train, held_out


def check(text: str, answer: str) -> bool:
    """Whether at least two different pirate words are in `text`. What it says is not judged."""
    del answer
    words = set(re.findall(r"'?[a-z]+'?", text.casefold().replace("\u2019", "'")))
    return len(words & PIRATE_WORDS) >= 2
