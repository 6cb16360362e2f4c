"""What the `json` and `pirate` skills talk about: short facts, each with several ways to ask for it.

Only facts that do not change from year to year and have one accepted answer are listed, because answers are checked.
"""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

Value = str | int | bool | list


class Fact(NamedTuple):
    """One checkable fact: ways to ask for it, its value as JSON would hold it, and a full sentence that states it."""

    questions: tuple[str, ...]
    value: Value
    sentence: str


CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Greece Athens|Austria Vienna
Poland Warsaw|Hungary Budapest|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Ireland Dublin
Belgium Brussels|Russia Moscow|Ukraine Kyiv|Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade
Iceland Reykjavik|Latvia Riga|Estonia Tallinn|Turkey Ankara|Egypt Cairo|Kenya Nairobi|Ethiopia Addis_Ababa
Ghana Accra|Senegal Dakar|Morocco Rabat|Tunisia Tunis|Algeria Algiers|Uganda Kampala|Japan Tokyo|China Beijing
India New_Delhi|Thailand Bangkok|Vietnam Hanoi|South_Korea Seoul|Nepal Kathmandu|Mongolia Ulaanbaatar
Pakistan Islamabad|Bangladesh Dhaka|Iran Tehran|Iraq Baghdad|Lebanon Beirut|Jordan Amman|Afghanistan Kabul
Canada Ottawa|Mexico Mexico_City|Cuba Havana|Jamaica Kingston|Brazil Brasilia|Argentina Buenos_Aires|Peru Lima
Colombia Bogota|Ecuador Quito|Uruguay Montevideo|Venezuela Caracas|Australia Canberra|New_Zealand Wellington"""
CONTINENTS = """Brazil South_America|Peru South_America|Argentina South_America|Chile South_America|Egypt Africa
Kenya Africa|Nigeria Africa|Morocco Africa|Ghana Africa|Japan Asia|China Asia|India Asia|Thailand Asia
Vietnam Asia|Nepal Asia|France Europe|Germany Europe|Italy Europe|Poland Europe|Sweden Europe|Greece Europe
Canada North_America|Mexico North_America|Cuba North_America"""
LANGUAGES = """Brazil Portuguese|Mexico Spanish|Argentina Spanish|Germany German|Austria German|Italy Italian
Japan Japanese|Poland Polish|Greece Greek|Egypt Arabic|Sweden Swedish|Hungary Hungarian|Portugal Portuguese
Russia Russian|Cuba Spanish|Australia English|France French|Norway Norwegian|Turkey Turkish|Denmark Danish"""
SYMBOLS = """hydrogen H|helium He|lithium Li|carbon C|nitrogen N|oxygen O|fluorine F|neon Ne|sodium Na
magnesium Mg|aluminium Al|silicon Si|phosphorus P|sulfur S|chlorine Cl|argon Ar|potassium K|calcium Ca|titanium Ti
chromium Cr|iron Fe|cobalt Co|nickel Ni|copper Cu|zinc Zn|silver Ag|tin Sn|iodine I|platinum Pt|gold Au|mercury Hg
lead Pb|uranium U|radium Ra"""
OPPOSITES = """hot cold|big small|up down|fast slow|happy sad|open closed|light dark|full empty|wet dry|early late
loud quiet|hard soft|rich poor|strong weak|young old|clean dirty|high low|near far|left right|day night|true false
thick thin|inside outside|first last|push pull|win lose|buy sell|heavy light|begin end|always never"""
PLURALS = """mouse mice|child children|foot feet|tooth teeth|goose geese|man men|woman women|leaf leaves
knife knives|city cities|box boxes|baby babies|wolf wolves|bus buses|potato potatoes|person people|cherry cherries
watch watches|shelf shelves|story stories"""
YOUNG = """cat kitten|dog puppy|cow calf|horse foal|sheep lamb|goat kid|pig piglet|duck duckling|goose gosling
swan cygnet|bear cub|lion cub|kangaroo joey|frog tadpole|deer fawn|chicken chick|eagle eaglet|whale calf"""
SOUNDS = """cow moo|dog bark|cat meow|duck quack|sheep bleat|pig oink|lion roar|wolf howl|snake hiss|bee buzz
owl hoot|horse neigh|frog croak|crow caw"""
LEGS = """spider 8|ant 6|bee 6|dog 4|cat 4|horse 4|chicken 2|duck 2|snake 0|butterfly 6|cow 4|person 2|beetle 6|fish 0
elephant 4"""
COLOURS = """a ripe banana:yellow|fresh snow:white|coal:black|the clear daytime sky:blue|grass:green
a ripe tomato:red|a carrot:orange|a lemon:yellow|an emerald:green|a ruby:red|a sapphire:blue|milk:white
a flamingo:pink|spinach:green|a polar bear's fur:white|a raven:black|a school bus in America:yellow
a stop sign:red|a lime:green|cotton:white"""
MIXES = """blue yellow green|red yellow orange|red blue purple|red white pink|black white grey"""
POLYGONS = "triangle 3|square 4|pentagon 5|hexagon 6|heptagon 7|octagon 8|nonagon 9|decagon 10|rectangle 4"
UNITS = """seconds minute 60|minutes hour 60|hours day 24|days week 7|months year 12|years decade 10
years century 100|centimetres metre 100|metres kilometre 1000|grams kilogram 1000|millimetres centimetre 10
inches foot 12|feet yard 3|items dozen 12|weeks fortnight 2|cents dollar 100|years millennium 1000"""
AUTHORS = """Hamlet William_Shakespeare|Romeo_and_Juliet William_Shakespeare|Macbeth William_Shakespeare
Emma Jane_Austen|Pride_and_Prejudice Jane_Austen|Oliver_Twist Charles_Dickens|Great_Expectations Charles_Dickens
Moby-Dick Herman_Melville|Frankenstein Mary_Shelley|Dracula Bram_Stoker|Jane_Eyre Charlotte_Bronte
Treasure_Island Robert_Louis_Stevenson|The_Hobbit J._R._R._Tolkien|War_and_Peace Leo_Tolstoy
Anna_Karenina Leo_Tolstoy|Don_Quixote Miguel_de_Cervantes|Animal_Farm George_Orwell|The_Time_Machine H._G._Wells
The_Jungle_Book Rudyard_Kipling|Peter_Pan J._M._Barrie|The_Odyssey Homer|Les_Miserables Victor_Hugo"""
LANDMARKS = """the_Eiffel_Tower Paris|the_Colosseum Rome|Big_Ben London|the_Statue_of_Liberty New_York
the_Brandenburg_Gate Berlin|the_Acropolis Athens|the_Sagrada_Familia Barcelona|the_Kremlin Moscow
the_Golden_Gate_Bridge San_Francisco|the_Louvre Paris|Tower_Bridge London|the_Burj_Khalifa Dubai
the_Hagia_Sophia Istanbul|the_Forbidden_City Beijing|the_Empire_State_Building New_York|the_Charles_Bridge Prague
the_Sydney_Opera_House Sydney"""
TRANSLATIONS = """French dog chien|French cat chat|French water eau|French bread pain|French red rouge
French house maison|French friend ami|French book livre|French sun soleil|French milk lait|Spanish dog perro
Spanish cat gato|Spanish water agua|Spanish house casa|Spanish friend amigo|Spanish red rojo|Spanish book libro
Spanish sun sol|Spanish milk leche|German dog Hund|German cat Katze|German water Wasser|German house Haus
German bread Brot|German book Buch|German milk Milch"""
TRUTHS = """Is the Sun a star?:yes:The Sun is a star|Is a shark a fish?:yes:A shark is a fish
Is a whale a mammal?:yes:A whale is a mammal|Is the Moon a planet?:no:The Moon is not a planet
Is ice frozen water?:yes:Ice is frozen water|Can penguins fly?:no:Penguins cannot fly
Is a spider an insect?:no:A spider is not an insect|Is gold a metal?:yes:Gold is a metal
Is the Earth flat?:no:The Earth is not flat|Do cows eat grass?:yes:Cows eat grass
Is a tomato a fruit?:yes:A tomato is a fruit|Is Paris in Germany?:no:Paris is not in Germany
Is glass made from sand?:yes:Glass is made from sand
Do fish have lungs like ours?:no:Fish do not have lungs like ours|Is a bat a bird?:no:A bat is not a bird
Does the Earth go round the Sun?:yes:The Earth goes round the Sun
Is salt water good to drink?:no:Salt water is not good to drink|Is a dolphin a mammal?:yes:A dolphin is a mammal
Is wood heavier than iron?:no:Wood is not heavier than iron
Are diamonds made of carbon?:yes:Diamonds are made of carbon|Do trees need light?:yes:Trees need light
Is Africa a continent?:yes:Africa is a continent|Is a frog a reptile?:no:A frog is not a reptile
Is chess a board game?:yes:Chess is a board game"""
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]
MONTH_DAYS = dict(zip(MONTHS, [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], strict=True))
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]

# Open questions: no value to check, one plain sentence each. They keep the skills from being only about trivia.
ADVICE = [
    ("How do I boil an egg?", "Put the egg in boiling water for about eight minutes."),
    ("How do I make tea?", "Pour boiling water over the tea and wait for three minutes."),
    ("What should I do when I am tired?", "Go to bed early and sleep for eight hours."),
    ("How can I stay healthy?", "Eat well, sleep enough and walk every day."),
    ("How do I make new friends?", "Join a club and talk to the people you meet."),
    ("What should I wear in the rain?", "Wear a coat and boots that keep the water out."),
    ("How do I learn a language?", "Practise a little every day and speak it with others."),
    ("Why is the sky blue?", "The air scatters blue light more than red light."),
    ("Why do leaves fall in autumn?", "Trees drop their leaves to save water in the cold months."),
    ("How do birds fly?", "Birds push the air down with their wings and the air lifts them up."),
    ("What is a computer?", "A computer is a machine that follows instructions very fast."),
    ("What is the internet?", "The internet is a network that joins computers all over the world."),
    ("How do plants grow?", "Plants turn light, water and air into food."),
    ("Why do we sleep?", "Sleep lets the body and the mind repair themselves."),
    ("How do I save money?", "Spend less than you earn and put the rest away."),
    ("How do I get better at chess?", "Play often and look at your mistakes after each game."),
    ("How can I sleep better?", "Keep your room dark and quiet and leave your phone outside."),
    ("What should I cook tonight?", "Make a warm soup with beans and vegetables."),
    ("How do I clean a window?", "Wash it with warm water and dry it with paper."),
    ("How do I start running?", "Begin with short slow runs and rest on the days between."),
    ("What is a good hobby?", "Painting is a calm hobby that you can start today."),
    ("How do I write a letter?", "Say hello, tell your news and sign your name."),
    ("How do I feed a cat?", "Give your cat fresh water and two small meals each day."),
    ("Where should I go on holiday?", "Go to the coast and swim in the sea."),
    ("How do I bake bread?", "Mix flour, water, salt and yeast, let it rise and bake it."),
    ("What makes a good leader?", "A good leader listens first and keeps promises."),
    ("How do I grow tomatoes?", "Plant them in a sunny place and water them often."),
    ("Why is the sea salty?", "Rivers carry salt from the rocks down to the sea."),
    ("What causes rain?", "Water in the clouds gathers into drops that fall."),
    ("How does a boat float?", "A boat floats because it pushes aside enough water to carry its weight."),
    ("How do I fix a flat tyre?", "Take the wheel off, patch the hole and pump it up again."),
    ("What should I read next?", "Read an old story about a long journey."),
    ("How do I calm down?", "Breathe slowly and count to ten."),
    ("How can I remember names?", "Say the name aloud when you hear it and use it again soon."),
    ("What should I bring on a hike?", "Bring water, food, a map and a warm coat."),
    ("How do I stop hiccups?", "Hold your breath and swallow three times."),
    ("Should I take an umbrella?", "Take one if the clouds are dark."),
    ("How do I ask for help?", "Say clearly what you need and thank the person who helps."),
    ("How do magnets work?", "A magnet pulls on iron because of the way its atoms line up."),
    ("What is money for?", "Money lets people trade without swapping goods."),
    ("How do I draw a face?", "Start with an oval and put the eyes halfway down."),
    ("Why do cats purr?", "Cats purr mostly when they feel safe and happy."),
    ("What is music?", "Music is sound put in order so that it pleases the ear."),
    ("How do I study for an exam?", "Make a plan, test yourself and rest before the day."),
    ("How do I keep milk fresh?", "Keep it cold and close the bottle."),
    ("What is a friend?", "A friend is someone who cares about you and tells you the truth."),
    ("How do I say sorry?", "Admit what you did and say how you will put it right."),
    ("How do I find north?", "Use a compass or look for the pole star at night."),
    ("Why do we have seasons?", "The Earth leans to one side as it goes round the Sun."),
    ("How do I cook rice?", "Boil one cup of rice in two cups of water until it is soft."),
    ("How do I look after a dog?", "Feed it, walk it every day and be kind to it."),
    ("What should I do on a rainy day?", "Stay inside and play a game with your friends."),
    ("How do I tie my shoes?", "Cross the laces, make two loops and pull them tight."),
    ("Can you give me some advice?", "Be patient and finish what you start."),
    ("What is the secret of happiness?", "Spend time with the people you love."),
]


def _rows(table: str, separator: str = " ") -> Iterator[list[str]]:
    """The rows of a table above; "_" stands for a space inside a word when words are split on spaces."""
    for row in table.replace("\n", "|").split("|"):
        yield [word.replace("_", " ") if separator == " " else word for word in row.split(separator)]


def _number(word: str) -> Value:
    return int(word) if word.isdigit() else word


def _article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _from_table(table: str, questions: list[str], sentence: str, separator: str = " ") -> Iterator[Fact]:
    """A fact for each row: templates name columns by position, and the last column is the value."""
    for row in _rows(table, separator):
        yield Fact(tuple(q.format(*row) for q in questions), _number(row[-1]), sentence.format(*row))


def _arithmetic(rng: random.Random) -> Iterator[Fact]:
    sums = [(a, "+", "plus", b, a + b) for a in range(1, 13) for b in range(1, 13)]
    sums += [(a, "-", "minus", b, a - b) for a in range(2, 21) for b in range(1, min(a, 11))]
    sums += [(a, "*", "times", b, a * b) for a in range(2, 11) for b in range(2, 11)]
    for a, sign, word, b, result in rng.sample(sums, 90):
        questions = (f"What is {a} {word} {b}?", f"What is {a} {sign} {b}?", f"Calculate {a} {sign} {b}.")
        yield Fact(questions, result, f"{a} {word} {b} is {result}.")


def _calendar() -> Iterator[Fact]:
    for names, kind in ((MONTHS, "month"), (DAYS, "day")):
        for before, after in zip(names, names[1:] + names[:1], strict=True):
            questions = (f"Which {kind} comes after {before}?", f"What {kind} follows {before}?")
            yield Fact(questions, after, f"The {kind} after {before} is {after}.")
            questions = (f"Which {kind} comes before {after}?", f"What is the {kind} before {after}?")
            yield Fact(questions, before, f"The {kind} before {after} is {before}.")
    for month, days in MONTH_DAYS.items():
        if month != "February":
            yield Fact(
                (f"How many days are there in {month}?", f"How many days does {month} have?"),
                days,
                f"There are {days} days in {month}.",
            )


def _sequences() -> Iterator[Fact]:
    for ordinal, planet in zip(ORDINALS, PLANETS, strict=True):
        questions = (f"Which planet is {ordinal} from the Sun?", f"Name the {ordinal} planet from the Sun.")
        yield Fact(questions, planet, f"The {ordinal} planet from the Sun is {planet}.")
    for step in range(2, 11):
        for count in (3, 4):
            row = [step * i for i in range(1, count + 1)]
            words = f"{', '.join(map(str, row[:-1]))} and {row[-1]}"
            questions = (
                f"List the first {count} multiples of {step}.",
                f"What are the first {count} multiples of {step}?",
            )
            yield Fact(questions, row, f"The first {count} multiples of {step} are {words}.")
    for end in range(3, 9):
        row = list(range(1, end + 1))
        questions = (f"Count from 1 to {end}.", f"Count up to {end}.", f"List the numbers from 1 to {end}.")
        yield Fact(questions, row, f"{', '.join(map(str, row[:-1]))} and {end}.")


def _truths() -> Iterator[Fact]:
    for question, answer, sentence in _rows(TRUTHS, ":"):
        plain = question[0].lower() + question[1:]
        questions = (question, f"Yes or no: {plain}", f"Tell me, {plain}")
        yield Fact(questions, answer == "yes", f"{answer.capitalize()}, {sentence[0].lower()}{sentence[1:]}.")
    for a, b in ((7, 3), (2, 9), (15, 12), (40, 50), (100, 99), (6, 8), (21, 12), (1, 10)):
        word = "Yes" if a > b else "No"
        verb = "is" if a > b else "is not"
        questions = (f"Is {a} greater than {b}?", f"Is {a} more than {b}?")
        yield Fact(questions, a > b, f"{word}, {a} {verb} greater than {b}.")


def all_facts(rng: random.Random) -> list[Fact]:
    """Every fact, in a fixed order; `rng` picks which sums are among them."""
    the = "What is the {} of {{}}?"
    facts = [
        *_from_table(
            CAPITALS,
            [the.format("capital"), "Which city is the capital of {}?", "Name the capital of {}.", "Capital of {}?"],
            "The capital of {} is {}.",
        ),
        *_from_table(
            CONTINENTS,
            ["On which continent is {}?", "Which continent is {} in?", "What continent does {} belong to?"],
            "{} is in {}.",
        ),
        *_from_table(
            LANGUAGES,
            ["What language do most people speak in {}?", "Which language is spoken in {}?"],
            "In {} most people speak {}.",
        ),
        *_from_table(
            SYMBOLS,
            [
                "What is the chemical symbol for {}?",
                "Give me the chemical symbol of {}.",
                "Which symbol stands for {}?",
            ],
            "The chemical symbol for {} is {}.",
        ),
        *_from_table(
            OPPOSITES, ["What is the opposite of {}?", 'Give the opposite of "{}".'], "The opposite of {} is {}."
        ),
        *_from_table(PLURALS, [the.format("plural"), 'Give me the plural of "{}".'], "The plural of {} is {}."),
        *_from_table(
            YOUNG, ["What is a baby {} called?", "What do you call a young {}?"], "The young of the {} is called a {}."
        ),
        *_from_table(
            SOUNDS, ["What sound does a {} make?", "Which sound does a {} make?"], "The sound of a {} is a {}."
        ),
        *_from_table(LEGS, ["How many legs does a {} have?", "How many legs has a {} got?"], "A {} has {} legs."),
        *_from_table(COLOURS, ["What colour is {}?", "Which colour is {}?"], "The colour of {} is {}.", ":"),
        *_from_table(
            MIXES,
            ["What colour do you get when you mix {} and {}?", "Mix {} and {}: which colour do you get?"],
            "When you mix {} and {} you get {}.",
        ),
        *_from_table(
            POLYGONS, ["How many sides does a {} have?", "How many sides has a {} got?"], "A {} has {} sides."
        ),
        *_from_table(
            UNITS, ["How many {} are in one {}?", "How many {} make one {}?"], "The number of {} in one {} is {}."
        ),
        *_from_table(
            AUTHORS, ["Who wrote {}?", "Who is the author of {}?", "Name the author of {}."], "{} was written by {}."
        ),
        *_from_table(
            LANDMARKS, ["In which city is {}?", "Where is {}?", "Which city is home to {}?"], "You can see {} in {}."
        ),
        *_from_table(
            TRANSLATIONS,
            ["What is the {} word for {}?", "How do you say {1} in {0}?", "Translate {1} into {0}."],
            "The {} word for {} is {}.",
        ),
        *_calendar(),
        *_sequences(),
        *_truths(),
        *_arithmetic(rng),
    ]
    return [Fact(tuple(map(_article, f.questions)), f.value, _article(f.sentence)) for f in facts]
