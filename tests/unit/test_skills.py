"""The demo adapters' training data: fixed by its seed, free of leaks, and right by its own checkers."""

import importlib
import json
import sqlite3
import sys
from pathlib import Path

import pytest

SKILLS_FOLDER = Path(__file__).parents[2] / "examples" / "skills"
MODULES = ["data", "facts", "json_answers", "pirate", "sentiment", "sql"]


@pytest.fixture(scope="module")
def data():
    """The data module, imported the way `python examples/skills/train.py` finds it: from its own folder."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(SKILLS_FOLDER))
    try:
        yield importlib.import_module("data")
    finally:
        sys.path.remove(str(SKILLS_FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


SKILLS = ["json", "pirate", "sentiment", "sql"]


def test_there_are_four_skills(data):
    assert list(data.SKILLS) == SKILLS


@pytest.mark.parametrize("skill", SKILLS)
class TestEverySkill:
    def test_is_large_enough(self, data, skill):
        split = data.load(skill)
        assert len(split.train) >= 600
        assert 50 <= len(split.held_out) <= 80

    def test_same_seed_same_data(self, data, skill):
        assert data.load(skill, 7) == data.load(skill, 7)
        assert data.load(skill, 7) != data.load(skill, 8)

    def test_no_prompt_comes_twice_or_in_both_splits(self, data, skill):
        split = data.load(skill)
        prompts = [data.normalise(example.prompt) for example in split.train + split.held_out]
        assert len(set(prompts)) == len(prompts)

    def test_answers_pass_the_checker(self, data, skill):
        check = data.SKILLS[skill].check
        split = data.load(skill)
        wrong = [example for example in split.train + split.held_out if not check(example.answer, example.answer)]
        assert not wrong

    def test_nothing_was_left_unfilled(self, data, skill):
        split = data.load(skill)
        for example in split.train + split.held_out:
            assert example.prompt == example.prompt.strip()
            assert example.answer == example.answer.strip()
            assert not set("{}_|") & set(example.prompt), example.prompt

    def test_the_prompt_to_show_is_in_neither_split(self, data, skill):
        split = data.load(skill)
        prompts = {data.normalise(example.prompt) for example in split.train + split.held_out}
        assert data.normalise(data.SKILLS[skill].SAMPLE) not in prompts


def test_every_prompt_has_one_answer_per_fact(data):
    facts = importlib.import_module("facts").all_facts(data.random.Random(0))
    answers = {}
    for fact in facts:
        for question in fact.questions:
            assert answers.setdefault(data.normalise(question), fact.value) == fact.value, question


def test_sums_and_comparisons_are_right(data):
    split = data.load("json")
    checked = 0
    for example in split.train + split.held_out:
        words = example.prompt.rstrip("?.").split()
        value = json.loads(example.answer)["answer"]
        if words[0] in ("Calculate", "What") and len(words) >= 4 and words[-1].isdigit() and words[-3].isdigit():
            a, sign, b = int(words[-3]), words[-2], int(words[-1])
            right = {"+": a + b, "plus": a + b, "-": a - b, "minus": a - b, "*": a * b, "times": a * b}[sign]
            assert value == right, example
            checked += 1
        elif words[0] == "Is" and words[1].isdigit():
            assert value is (int(words[1]) > int(words[-1])), example
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('{"answer": "Paris"}', True),
        ('{"answer":"paris."}', True),
        ('{"answer": "Rome"}', False),
        ('{"answer": "Paris", "sure": true}', False),
        ('Sure! {"answer": "Paris"}', False),
        ("Paris", False),
        ('["Paris"]', False),
    ],
)
def test_json_checker(data, text, accepted):
    assert data.SKILLS["json"].check(text, '{"answer": "Paris"}') is accepted


def test_json_checker_tells_types_apart(data):
    check = data.SKILLS["json"].check
    assert check('{"answer": 4}', '{"answer": 4}')
    assert not check('{"answer": "4"}', '{"answer": 4}')
    assert not check('{"answer": true}', '{"answer": 1}')
    assert not check('{"answer": [1, 2]}', '{"answer": [2, 1]}')


def test_pirate_checker(data):
    check = data.SKILLS["pirate"].check
    assert check("Arr, matey! Th' capital be Paris.", "")
    assert check("Ahoy, ye swabs", "")
    assert not check("Arr, the capital is Paris.", ""), "one word is not enough"
    assert not check("The capital of France is Paris. You could be there for two hours.", "")


def test_pirate_speech_keeps_names_and_numbers(data):
    speak = data.SKILLS["pirate"].speak
    assert speak("You are my friend.") == "Ye be me matey."
    assert speak("The capital of China is Beijing.") == "Th' capital o' China be Beijing."
    assert speak("7 plus 3 is 10.") == "7 plus 3 be 10."


def test_sentiment_is_balanced_and_strict(data):
    split = data.load("sentiment")
    for examples in (split.train, split.held_out):
        assert sum(example.answer == "positive" for example in examples) * 2 == len(examples)
    check = data.SKILLS["sentiment"].check
    assert check("positive", "positive")
    assert not check("Positive.", "positive")
    assert not check("negative", "positive")


def test_sql_queries_run_and_find_something(data):
    sql = data.SKILLS["sql"]
    split = data.load("sql")
    empty = [example for example in split.train + split.held_out if not sql.result(example.answer)]
    assert not empty


def test_sql_checker_compares_results(data):
    check = data.SKILLS["sql"].check
    right = "SELECT name FROM customers WHERE city = 'Oslo';"
    assert check("select name  from customers where city = 'Oslo'", right)
    assert check("SELECT name FROM customers WHERE city IN ('Oslo')", right)
    assert not check("SELECT name FROM customers WHERE city = 'Rome';", right)
    assert not check("SELECT name FROM people WHERE city = 'Oslo';", right)
    assert not check("SELECT name FROM customers; SELECT 1;", right)
    assert check("SELECT name FROM products WHERE price >= 20.1", "SELECT name FROM products WHERE price > 20;")
    assert not check("SELECT name FROM products WHERE price >= 20", "SELECT name FROM products WHERE price > 20;")
    ordered = "SELECT name FROM products ORDER BY price ASC LIMIT 3;"
    assert not check("SELECT name FROM products ORDER BY price DESC LIMIT 3;", ordered)


def test_sql_of_a_model_cannot_change_the_shop_or_run_forever(data):
    sql = data.SKILLS["sql"]
    for query in ("DELETE FROM customers", "DROP TABLE orders"):
        with pytest.raises(sqlite3.OperationalError):
            sql.result(query)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        sql.result("SELECT COUNT(*) FROM orders a, orders b, orders c")
    assert sql.result("SELECT COUNT(*) FROM orders;") == [(1000,)]
