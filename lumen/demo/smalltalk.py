"""What else is said at Café Lumen: confirmations, questions and answers, little stories, and notes in JSON."""

import random

from lumen.demo.orders import ITEMS, NUMBERS, SIZES, Order, as_json
from lumen.demo.phrases import sentence_case

_CONFIRMATIONS = (  # {wish} is the order in the barista's words, {Wish} the same with a capital
    "Sure, {name}! {Wish}, coming up.",
    "Coming right up, {name}: {wish}.",
    "{Wish} for {name}, with pleasure.",
    "Thank you, {name}! That's {wish}.",
    "Of course. {Wish} for {name}.",
    "Got it, {name}: {wish}. Have a seat by the window!",
    "Lovely choice, {name}! {Wish}, on the way.",
    '{Wish}, and "{name}" on the cup.',
    "{name}, right? {Wish}, just a moment.",
    "With pleasure! {Wish} for {name}, freshly made.",
)

_INSTRUCTIONS = (
    "You are the barista of Café Lumen.",
    "You work at Café Lumen, a small café by the river. Be friendly and brief.",
    "Answer the guests of Café Lumen.",
)
_TALK = {  # questions that mean the same: answers that fit any of them
    "Hello! / Hi there! / Good morning! / Hey!": "Hello! What can I get you? / Welcome! What would you like?",
    "How are you? / How is it going today?": "Wonderful, thank you! / Busy and happy! And you?",
    "Who are you? / What's your name?": "I'm Lumi, the barista of Café Lumen. / Lumi! I make the coffee around here.",
    "When do you open? / Are you open on Sunday?": "We are open from eight to six, every day but Monday.",
    "When do you close? / How late are you open?": "We close at six. The last cake usually goes at five.",
    "Where are you? / How do I find you?": "By the river, next to the old bookshop. Follow the smell of coffee.",
    "Do you have wifi? / What's the wifi password?": "We do. The password is slowcoffee, all in one word.",
    "May I bring my dog? / Are dogs allowed?": "Dogs are welcome. There is a bowl of water by the door.",
    "Can I pay by card? / Do you take cards?": "Card or cash, both are fine. / Cards are fine, and so are coins.",
    "What do you have? / What's on the menu?": f"We have {', '.join(ITEMS[:6])} and much more.",
    "Do you have cake? / Is there anything to eat?": "Today there is carrot cake and a plum tart, while it lasts!",
    "Do you have oat milk? / Which milks do you have?": "Oat, soy, almond and coconut, and plain milk of course.",
    "Which sizes are there? / How big are the cups?": "Small, medium and large. Medium is what most people take.",
    "Can I sit outside? / Is there a garden?": "Yes, under the chestnut tree. Blankets are by the door.",
    "It's raining. / What a grey day.": "Then stay a little longer. Rain sounds best with a hot cup.",
    "It's so hot today. / What a summer!": "Lemonade weather! Or an iced tea in the shade?",
    "What do you recommend? / What's good here? / Surprise me!": "A hot chocolate. / The flat white. It's our pride.",
    "Where do the beans come from? / Who roasts your coffee?": "The beans are from Ethiopia. We roast them on Mondays.",
    "I'm tired. / I hardly slept.": "Then an espresso first, and the rest of the day after.",
    "Do you have decaf? / Is there coffee without caffeine?": "No decaf today, but the mint tea is lovely.",
    "Tell me a joke. / Do you know a joke?": "How does a cup greet a kettle? With a little steam.",
    "What's the meaning of life?": "I only know about coffee. But a second cup never hurts.",
    "Who won the match? / What is the capital of France?": "I'm afraid I only know about coffee.",
    "Thanks! / Thank you! / That was delicious.": "My pleasure! / You're welcome. See you soon!",
    "Goodbye! / Bye! / See you tomorrow!": "Goodbye! Mind the step. / See you soon!",
}
_TASTES = {  # what each thing on the menu is like
    "espresso": "short and strong",
    "americano": "an espresso with time to think",
    "latte": "mild and milky",
    "cappuccino": "half coffee, half cloud",
    "flat white": "smooth and a little strong",
    "cortado": "small, warm and balanced",
    "mocha": "coffee that fell in love with chocolate",
    "hot chocolate": "thick and sweet",
    "chai latte": "spicy and soft",
    "matcha latte": "green and grassy",
    "iced coffee": "cold and wide awake",
    "green tea": "light and clear",
    "black tea": "dark and honest",
    "mint tea": "fresh as a garden",
    "iced tea": "cool and fruity",
    "lemonade": "sour, sweet and sunny",
}
_STORIES = (
    "{name} came in from the rain and asked for {wish}. The windows fogged up, and nobody was in a hurry.",
    "One morning {name} carried {wish} across the river without spilling a drop.",
    "There once was a guest called {name} who ordered {wish} and forgot to go home.",
    "{name} left a poem under the saucer. It was about {wish}.",
)
_THINGS = ("umbrella", "scarf", "book", "hat", "key", "letter", "bag", "pen", "glove", "ticket")
_COLORS = ("blue", "red", "green", "yellow", "grey", "white", "black")
_DAYS = ("Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FIELDS = ("name", "item", "size", "count", "extra")
_FIELD_REQUESTS = (  # {order} is what a guest said
    "As JSON with {fields}: {order}",
    "Note the {fields} as JSON: {order}",
    "JSON, please, just {fields}: {order}",
    "{order} Write down {fields} as JSON.",
)
_NOTE_REQUESTS = (
    "As JSON, please: {}",
    "Note this as JSON: {}",
    "{} Write that down as JSON.",
    "JSON for the notebook: {}",
)


def instructions(rng: random.Random) -> list[dict[str, str]]:
    """A system turn."""
    return [{"role": "system", "content": rng.choice(_INSTRUCTIONS)}]


def confirmation(rng: random.Random, order: Order) -> str:
    """The barista's friendly answer to an order, with every fact of it."""
    wish = order.as_words()
    return sentence_case(rng.choice(_CONFIRMATIONS).format(name=order.name, wish=wish, Wish=sentence_case(wish)))


def question(rng: random.Random, item: str) -> tuple[str, str]:
    """A question that is no order, and its answer; about `item` now and then."""
    kind = rng.random()
    if kind < 0.1:
        asked = rng.choice(("What is {item} like?", "How does {item} taste?"))
        return asked.format(item=item), f"It's {_TASTES[item]}."
    if kind < 0.3:
        asked = rng.choice(("How much is a {size} {item}?", "What does a {size} {item} cost?"))
        size = rng.choice(SIZES)
        euros = NUMBERS[2 + SIZES.index(size) + len(item) % 3]  # any rule will do, as long as it is always the same
        return asked.format(size=size, item=item), f"That's {euros} euros."
    questions, answers = rng.choice(tuple(_TALK.items()))
    return rng.choice(questions.split(" / ")), rng.choice(answers.split(" / "))


def story(rng: random.Random, order: Order) -> tuple[str, str]:
    """A story that is asked for, about a guest and an order."""
    asked = rng.choice(("Tell me a story about {name} and {wish}.", "Do you know the story of {name} and {wish}?"))
    facts = {"name": order.name, "wish": order.as_words()}
    return asked.format(**facts), rng.choice(_STORIES).format(**facts)


def note(rng: random.Random, name: str, item: str) -> tuple[str, str]:
    """A fact that a colleague wants in the notebook as JSON, and the JSON; never an order."""
    thing, color, day, count = rng.choice(_THINGS), rng.choice(_COLORS), rng.choice(_DAYS), rng.randint(2, 9)
    number = rng.choice((NUMBERS[count], str(count)))
    size = rng.choice(SIZES)
    fact, record = rng.choice(
        (
            (f"{name} left a {color} {thing} here.", {"name": name, "lost": thing, "color": color}),
            (f"{name} found a {thing}, but we don't know its color.", {"name": name, "found": thing, "color": None}),
            (f"A table for {name} on {day}, {number} people.", {"name": name, "day": day, "people": count}),
            (f"{name} works on {day}.", {"name": name, "works": day}),
            (f"There are {number} {size} cups left.", {"cups": size, "left": count}),
            (f"We are out of {item}.", {"item": item, "left": 0}),
            (f"{number} guests asked for {item} on {day}.", {"item": item, "count": count, "day": day}),
            (f"Our new colleague is called {name}.", {"name": name, "new": True}),
        )
    )
    return rng.choice(_NOTE_REQUESTS).format(sentence_case(fact)), as_json(record)


def fields(rng: random.Random, order: Order, said: str) -> tuple[str, str]:
    """Some facts of an order that a guest `said`, asked for by name as JSON, and the JSON; never all five facts."""
    names = rng.sample(_FIELDS, rng.randint(1, 4))
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    asked = rng.choice(_FIELD_REQUESTS).format(fields=listed, order=said)
    return asked, as_json({name: getattr(order, name) for name in names})
