"""The `sql` skill: a question about a small shop becomes one SQL query.

The adapter learns the schema: the prompt is only the question.
"""

import random
import re
import sqlite3
from functools import cache

ABOUT = "Turns a question about the shop below into one SQL query."
SAMPLE = "How many customers live in Oslo?"

SCHEMA = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, product_id INTEGER, quantity INTEGER, year INTEGER);
"""

# Values that questions may name. "|" parts those trained on from those that only held-out questions name.
VALUES: dict[str, str] = {
    "city": """Berlin Paris Oslo Rome Madrid Lisbon Vienna Dublin Prague Athens Warsaw London Boston Chicago Toronto
        Tokyo | Helsinki Zurich Denver Milan""",
    "customer": """Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Karin Liam Maria Nora Oscar Paula
        | Quentin Rosa Simon Tara""",
    "product": """lamp chair desk notebook pen kettle mug blanket candle mirror bottle radio clock vase basket hammer
        | ladder pillow teapot umbrella""",
    "category": "kitchen office garden toys books sports | music travel",
    "price": "10 15 20 25 30 40 50 60 75 80 | 35 45",
    "count": "2 3 4 5 6 8 10 12 15 20 | 7 9",
    "year": "2018 2019 2020 2021 2022 | 2023",
}

# A paragraph a query: ways to ask for it, then the query. The last way is kept for held-out questions.
QUERIES = """\
How many customers live in {city}?
Count the customers in {city}.
What is the number of customers in {city}?
How many customers are from {city}?
SELECT COUNT(*) FROM customers WHERE city = '{city}';

Who lives in {city}?
List the names of the customers in {city}.
Show me everyone in {city}.
Which customers live in {city}?
SELECT name FROM customers WHERE city = '{city}';

Where does {customer} live?
What is the city of {customer}?
In which city does {customer} live?
Which city is {customer} from?
SELECT city FROM customers WHERE name = '{customer}';

How much does the {product} cost?
What is the price of the {product}?
How much is the {product}?
Show me the price of the {product}.
SELECT price FROM products WHERE name = '{product}';

How many of the {product} are in stock?
What is the stock of the {product}?
How many of the {product} are left?
Show the stock of the {product}.
SELECT stock FROM products WHERE name = '{product}';

Which category is the {product} in?
What is the category of the {product}?
What kind of product is the {product}?
Show the category of the {product}.
SELECT category FROM products WHERE name = '{product}';

Which products cost more than {price}?
List products over {price}.
What do we sell for more than {price}?
Show the products with a price above {price}.
SELECT name FROM products WHERE price > {price};

Which products cost less than {price}?
List products under {price}.
Which products are cheaper than {price}?
Show the products with a price below {price}.
SELECT name FROM products WHERE price < {price};

How many products cost more than {price}?
Count the products over {price}.
How many products have a price above {price}?
What is the number of products that cost more than {price}?
SELECT COUNT(*) FROM products WHERE price > {price};

List the products in the {category} category.
Which {category} products do we sell?
What {category} products are there?
Show all {category} products.
SELECT name FROM products WHERE category = '{category}';

How many {category} products are there?
Count the {category} products.
What is the number of {category} products?
How many products are in the {category} category?
SELECT COUNT(*) FROM products WHERE category = '{category}';

What is the average price of {category} products?
Average price in the {category} category?
What do {category} products cost on average?
How much does a {category} product cost on average?
SELECT AVG(price) FROM products WHERE category = '{category}';

What is the highest price in the {category} category?
How much is the most expensive {category} product?
Highest price of {category} products?
What is the maximum price of {category} products?
SELECT MAX(price) FROM products WHERE category = '{category}';

What is the lowest price in the {category} category?
How much is the cheapest {category} product?
Lowest price of {category} products?
What is the minimum price of {category} products?
SELECT MIN(price) FROM products WHERE category = '{category}';

Show the {count} most expensive products.
What are the {count} products with the highest price?
List the {count} most expensive products.
List the top {count} products by price.
SELECT name FROM products ORDER BY price DESC LIMIT {count};

Show the {count} cheapest products.
What are the {count} cheapest products?
List the {count} least expensive products.
List the {count} products with the lowest price.
SELECT name FROM products ORDER BY price ASC LIMIT {count};

Which products have fewer than {count} in stock?
List products with stock below {count}.
Show products with a stock under {count}.
Which products have less than {count} left in stock?
SELECT name FROM products WHERE stock < {count};

Which {category} products cost less than {price}?
List {category} products under {price}.
Which {category} products have a price below {price}?
Show {category} products cheaper than {price}.
SELECT name FROM products WHERE category = '{category}' AND price < {price};

How many orders were made in {year}?
Count the orders of {year}.
What is the number of orders in {year}?
How many orders did we get in {year}?
SELECT COUNT(*) FROM orders WHERE year = {year};

How many orders has {customer} made?
Count the orders of {customer}.
How often did {customer} order?
How many times did {customer} order something?
SELECT COUNT(*) FROM orders JOIN customers ON customers.id = orders.customer_id WHERE customers.name = '{customer}';

How many times was the {product} ordered?
Count the orders of the {product}.
How often was the {product} ordered?
How many orders are there for the {product}?
SELECT COUNT(*) FROM orders JOIN products ON products.id = orders.product_id WHERE products.name = '{product}';

How many of the {product} were sold in total?
What is the total quantity sold of the {product}?
What quantity of the {product} was ordered in total?
Sum up the quantity of the {product} in all orders.
SELECT SUM(quantity) FROM orders JOIN products ON products.id = orders.product_id WHERE products.name = '{product}';

How many orders came from {city}?
Count the orders from {city}.
What is the number of orders from {city}?
How many orders did customers in {city} make?
SELECT COUNT(*) FROM orders JOIN customers ON customers.id = orders.customer_id WHERE customers.city = '{city}';

What did {customer} order?
Which products did {customer} buy?
What has {customer} bought?
List the products that {customer} ordered.
SELECT DISTINCT products.name FROM orders JOIN customers ON customers.id = orders.customer_id \
JOIN products ON products.id = orders.product_id WHERE customers.name = '{customer}';

Who ordered the {product}?
Which customers bought the {product}?
Who has bought the {product}?
List the customers who ordered the {product}.
SELECT DISTINCT customers.name FROM orders JOIN customers ON customers.id = orders.customer_id \
JOIN products ON products.id = orders.product_id WHERE products.name = '{product}';

How many customers are there?
Count all customers.
What is the number of customers?
How many customers do we have?
SELECT COUNT(*) FROM customers;

How many products are there?
Count all products.
What is the number of products?
How many products do we sell?
SELECT COUNT(*) FROM products;

How many orders are there?
Count all orders.
What is the number of orders?
How many orders do we have?
SELECT COUNT(*) FROM orders;

List all customers.
Show the names of all customers.
List every customer.
Who are our customers?
SELECT name FROM customers;

What is the average price of a product?
What is the average price of all products?
Average price of our products?
What does a product cost on average?
SELECT AVG(price) FROM products;

How many customers are in each city?
Count the customers per city.
Number of customers by city?
How many customers does each city have?
SELECT city, COUNT(*) FROM customers GROUP BY city;

How many products are in each category?
Count the products per category.
Number of products by category?
How many products does each category have?
SELECT category, COUNT(*) FROM products GROUP BY category;

What is the average price per category?
Average price by category?
What is the average price in each category?
Show the average price of each category.
SELECT category, AVG(price) FROM products GROUP BY category;

Which cities do customers live in?
List all cities.
Show the cities of our customers.
Show every city once.
SELECT DISTINCT city FROM customers;

Which products are out of stock?
List products with no stock.
Show the products with a stock of zero.
Which products are sold out?
SELECT name FROM products WHERE stock = 0;

What is the most expensive product?
Which product costs the most?
Show the most expensive product.
Which product has the highest price?
SELECT name FROM products ORDER BY price DESC LIMIT 1;

What is the cheapest product?
Which product costs the least?
Show the cheapest product.
Which product has the lowest price?
SELECT name FROM products ORDER BY price ASC LIMIT 1;
"""

FRAMES = [""] * 4 + ["Query: ", "I need to know: ", "Write the SQL: ", "A question about the shop: "]
TRAINED_PER_QUERY = 40


def values(kind: str, held_out: bool) -> list[str]:
    """The values of a kind that training or held-out questions may name."""
    trained, new = VALUES[kind].split("|")
    return (new if held_out else trained).split()


def pairs(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of question and query.

    Each query is held out twice: asked in a new way about known values, and in a known way about new values. A query
    without values is held out once.
    """
    train, held_out = [], []
    for paragraph in QUERIES.strip().split("\n\n"):
        *known_ways, new_way, query = paragraph.split("\n")
        kinds = [kind for kind in VALUES if f"{{{kind}}}" in query]

        def fill(text: str, new: bool, query: str = query, kinds: list[str] = kinds) -> tuple[str, str]:
            chosen = {kind: rng.choice(values(kind, new)) for kind in kinds}
            return text.format(**chosen), query.format(**chosen)

        held_out.append(fill(new_way, new=False))
        if kinds:
            held_out.append(fill(rng.choice(known_ways), new=True))
        for i in range(TRAINED_PER_QUERY):
            train.append(fill(rng.choice(FRAMES) + known_ways[i % len(known_ways)], new=False))
    return train, held_out


@cache
def shop() -> sqlite3.Connection:
    """An in-memory shop, the same each time, in which every value has rows. Queries cannot change it."""
    rng = random.Random("shop")
    named = {kind: values(kind, False) + values(kind, True) for kind in VALUES}
    cities = named["city"] * 3
    rng.shuffle(cities)
    # Each named customer and product is there once, so that "where does Anna live" has one answer; others are numbered.
    names = named["customer"] + [f"guest {i}" for i in range(len(cities) - len(named["customer"]))]
    customers = [(i, name, city) for i, (name, city) in enumerate(zip(names, cities, strict=True), 1)]
    names = named["product"] + [f"thing {i}" for i in range(60)]
    # Prices differ from each other, so that an order by price has one result; the round ones tell > from >=.
    prices = [float(price) for price in named["price"]]
    prices += [price + 0.5 for price in rng.sample(range(3, 120), len(names) - len(prices))]
    rng.shuffle(prices)
    products = [
        (i, name, named["category"][i % len(named["category"])], price, rng.randrange(25))
        for i, (name, price) in enumerate(zip(names, prices, strict=True), 1)
    ]
    orders = [
        (
            i,
            rng.randint(1, len(customers)),
            rng.randint(1, len(products)),
            rng.randint(1, 9),
            int(rng.choice(named["year"])),
        )
        for i in range(1, 1001)
    ]
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    for table, rows in (("customers", customers), ("products", products), ("orders", orders)):
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    connection.commit()
    connection.execute("PRAGMA query_only = ON")
    return connection


def result(query: str) -> list[tuple]:
    """The rows a query gives on the shop, sorted unless it orders them itself. Raises sqlite3.Error if it does not run.

    A query is stopped after two million steps of SQLite's machine: a model can write a join without a condition.
    """
    steps = iter((0, 0))
    connection = shop()
    connection.set_progress_handler(lambda: next(steps, 1), 1_000_000)
    rows = connection.execute(query).fetchall()
    return rows if "order by" in query.lower() else sorted(rows, key=repr)


def normalise(query: str) -> str:
    """A query without the differences in case, spacing and closing semicolon that do not matter."""
    return re.sub(r"\s+", " ", query).strip().rstrip(";").strip().casefold()


def check(text: str, answer: str) -> bool:
    """Whether `text` is one query that equals the right one or, on the shop, gives the same rows."""
    if normalise(text) == normalise(answer):
        return True
    try:
        return result(text) == result(answer)
    except (sqlite3.Error, sqlite3.Warning):
        return False
