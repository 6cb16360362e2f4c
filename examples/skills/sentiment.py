"""The `sentiment` skill: one word, `positive` or `negative`, for what someone wrote."""

import random

ABOUT = "Says in one word whether a sentence is `positive` or `negative`."
SAMPLE = "The waiter was rude and the soup was cold."

# A paragraph a kind of thing: names for it (=), what people say who like it (+), and who do not (-).
TOPICS = """\
= the soup; the pizza; my burger; the breakfast; the cake; the fish
+ was delicious; tasted wonderful; was fresh and full of flavour; was cooked perfectly; was the best I have ever had
+ was warm, rich and tasty
- was cold and greasy; tasted awful; was burnt; was far too salty; made me feel sick; was dry and had no flavour

= the film; this movie; the play; the show; the last episode; the ending
+ was brilliant; made me laugh out loud; kept me on the edge of my seat; was moving and beautifully made
+ was well worth the ticket; is a masterpiece
- was boring; put me to sleep; made no sense at all; was a waste of two hours; was badly acted; is a complete mess

= the hotel; our room; the apartment; the campsite; the cabin; the guest house
+ was spotless; had a lovely view; was quiet and comfortable; felt like home; was cosy and welcoming; was great value
- was filthy; smelled of smoke; was noisy all night; had insects in the bed; was cold and damp
- was nothing like the pictures

= the phone; this laptop; the camera; the headset; the printer; the vacuum cleaner
+ worked perfectly from day one; exceeded my expectations; made my life easier; was simple to set up
+ was worth every penny; gave me no trouble at all
- broke after a week; stopped working; fell apart in my hands; was cheap and useless; kept failing
- was a waste of money

= the staff; the waiter; the nurse; the driver; customer support; the receptionist
+ could not have been kinder; went out of their way to help; greeted us with a smile; solved the problem in minutes
+ treated us like family; deserved a big tip
- ignored us; shouted at my mother; lied to me; could not be bothered to help; made us wait for two hours
- was rude from start to finish

= this book; the novel; the article; her new poem; the story; the guide
+ was impossible to put down; taught me a lot; touched my heart; was clear and well written; is a joy to read
+ made me smile on every page
- was dull and far too long; was full of mistakes; bored me to tears; was confusing; is not worth reading; let me down

= the app; this game; the website; the update; the new version; the program
+ runs smoothly; is great fun; is fast and easy to use; saves me hours every week; looks fantastic
+ does exactly what I need
- crashes all the time; is slow and ugly; deleted all my work; is full of annoying ads; freezes every few minutes
- is impossible to use

= the trip; our holiday; the flight; the train ride; the tour; the cruise
+ was unforgettable; was relaxing and fun; was a dream come true; went without a hitch; was the highlight of my year
+ was even better than I had hoped
- was a nightmare; was a disaster; was cancelled at the last minute; left us exhausted and angry; was ruined by delays
- was a huge disappointment

= the concert; the party; the class; the lecture; the wedding; the match
+ was fantastic; was full of energy; inspired me; had a wonderful atmosphere; was pure joy; flew by
- was terrible; was badly organised; was painfully slow; gave me a headache; was a letdown; dragged on forever

= the jacket; this coat; the dress; the backpack; this mattress; the sofa
+ fits perfectly; feels soft and well made; is the most comfortable I have owned; still looks like new
+ gets me compliments every day; is beautiful and strong
- fell apart in the wash; hurts my back; is itchy and badly made; tore on the first day; is ugly and uncomfortable
- smells of chemicals
"""
FEELINGS = {
    "positive": [
        "I love {}.", "I am so happy with {}.", "I would recommend {} to anyone.", "What a treat: {}!",
        "I cannot stop praising {}.", "Five stars for {}.",
    ],
    "negative": [
        "I hate {}.", "I am so disappointed with {}.", "I would not recommend {} to anyone.", "Stay away from {}.",
        "I am angry about {}.", "One star for {}.",
    ],
}  # fmt: skip
FRAMES = ["{}.", "{}!", "Honestly, {}.", "I must say that {}.", "We both thought that {}.", "In the end {}."]
# The last clause decides; the same words in the other order have the other sentiment.
CONTRASTS = [
    "They said that {0}, but {1}.",
    "Everyone told me that {0}, yet {1}.",
    "I had heard that {0}. In fact, {1}.",
]
ASKED = ["{}", "{}", "{}", "Review: {}", 'Is this positive or negative? "{}"', "What is the sentiment? {}"]

# Written one by one, with other words and other shapes than the templates make.
HELD_OUT = {
    "positive": [
        "My daughter has not stopped talking about the zoo since Sunday.",
        "Best haircut I have had in years.",
        "They refunded me within an hour and even apologised.",
        "I was nervous at first, but the dentist was gentle and patient.",
        "The garden smells amazing after the rain.",
        "You made my day!",
        "Not bad at all, I will be back.",
        "The new teacher explains everything so well.",
        "Great coffee, friendly people, fair prices.",
        "The bike rides like a charm.",
        "I finally got the job, I am over the moon!",
        "Her voice gives me goosebumps in the best way.",
        "Superb quality and quick delivery.",
        "This little lamp makes the whole room feel warm.",
        "Thank you for a magical evening.",
    ],
    "negative": [
        "My parcel arrived three weeks late and the box was crushed.",
        "Worst haircut I have ever had.",
        "They refused to give me my money back.",
        "The dentist hurt me and did not even say sorry.",
        "The garden is full of rubbish and broken glass.",
        "You ruined my day.",
        "Never again, I want my money back.",
        "The new teacher yells at the children.",
        "Weak coffee, grumpy people, silly prices.",
        "The bike rattles and the brakes do not work.",
        "I failed the exam and feel miserable.",
        "Her singing was painful to listen to.",
        "Poor quality and very slow delivery.",
        "The lamp flickers and buzzes so much that I threw it away.",
        "I cried all evening because of how they treated us.",
    ],
}  # fmt: skip


def topics() -> list[tuple[list[str], list[str], list[str]]]:
    """The topics above: (names, what people say who like it, who do not)."""
    found = []
    for paragraph in TOPICS.strip().split("\n\n"):
        said: dict[str, list[str]] = {"=": [], "+": [], "-": []}
        for line in paragraph.split("\n"):
            said[line[0]] += line[2:].split("; ")
        found.append((said["="], said["+"], said["-"]))
    return found


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def pairs(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of prompt and answer, half of each positive.

    Of the held-out ones half are written by hand; the rest use the templates with words that training never sees.
    """
    train, held_out = [], [(text, label) for label, texts in HELD_OUT.items() for text in texts]
    for things, liked, disliked in topics():
        said = {"positive": liked, "negative": disliked}
        new_thing = things.pop(rng.randrange(len(things)))
        for label in said:
            new_words = said[label].pop(rng.randrange(len(said[label])))
            held_out.append((_sentence(f"{new_thing} {new_words}."), label))
        for thing in things:
            for label, other in (("positive", "negative"), ("negative", "positive")):
                clauses = [f"{thing} {words}" for words in said[label]]
                texts = [_sentence(rng.choice(FRAMES).format(clause)) for clause in clauses]
                texts.append(_sentence(rng.choice(FEELINGS[label]).format(thing)))
                before, after = rng.choice(said[other]), rng.choice(said[label])
                texts.append(rng.choice(CONTRASTS).format(f"{thing} {before}", f"{thing} {after}"))
                train += [(rng.choice(ASKED).format(text), label) for text in texts]
        for label, shapes in FEELINGS.items():
            held_out.append((_sentence(rng.choice(shapes).format(new_thing)), label))
    return train, held_out


def check(text: str, answer: str) -> bool:
    """Whether `text` is exactly the right word; only spaces around it are forgiven."""
    return text.strip() == answer
