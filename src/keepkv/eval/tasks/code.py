"""Values in code: constants and default arguments among functions of Python's standard library, which every machine has.

The functions differ between versions of Python, and so do the samples: compare runs of the same version.
"""

from __future__ import annotations

from dataclasses import replace

from keepkv.eval.metrics import named
from keepkv.eval.sample import Draw, Prose, Question, Sample, spread
from keepkv.eval.tasks import haystack
from keepkv.eval.tasks.facts import Fact
from keepkv.eval.tasks.needles import NAMES
from keepkv.eval.tasks.task import twice

CONSTANT = "In the code above, what is the value of {}?"
DEFAULT = "In the code above, what is the default value of {} in the function {}?"
NUMBERS = [str(number) for number in range(101, 1000)]

FACTS = (
    Fact(
        "MAX_UPLOAD_RETRIES = {}\n\n",
        CONSTANT.format("MAX_UPLOAD_RETRIES"),
        "How many times is a failed transfer to the server attempted again?",
        NUMBERS,
    ),
    Fact(
        "TICKET_PRICE = {}\n\n",
        CONSTANT.format("TICKET_PRICE"),
        "How much money does an entry to the show cost?",
        NUMBERS,
    ),
    Fact(
        'DEFAULT_BACKGROUND = "{}"\n\n',
        CONSTANT.format("DEFAULT_BACKGROUND"),
        "Which color does a page have behind its letters?",
        ["turquoise", "crimson", "violet", "orange", "silver", "beige"],
    ),
    Fact(
        'BACKUP_FOLDER = "{}"\n\n',
        CONSTANT.format("BACKUP_FOLDER"),
        "In which directory are copies of the data stored for safety?",
        ["attic", "cellar", "vault", "garage", "locker", "cabin"],
    ),
    Fact(
        'ADMIN = "{}"\n\n',
        CONSTANT.format("ADMIN"),
        "Who runs the system?",
        [name.lower() for name in NAMES],
    ),
    Fact(
        'def bake_bread(flour, minutes={}):\n    """Puts it into the oven."""\n    return Oven().bake(flour, minutes)\n\n\n',
        DEFAULT.format("minutes", "bake_bread"),
        "How long does it take until a loaf is ready?",
        NUMBERS,
    ),
    Fact(
        'def open_session(host, timeout={}):\n    """Opens a session."""\n    return Session(host, timeout)\n\n\n',
        DEFAULT.format("timeout", "open_session"),
        "After how many seconds does a new connection give up waiting?",
        NUMBERS,
    ),
    Fact(
        'def greet(visitor, word="{}"):\n    """Greets a visitor."""\n    print(word, visitor)\n\n\n',
        DEFAULT.format("word", "greet"),
        "What is said to a guest who comes in?",
        ["welcome", "ahoy", "howdy", "cheers", "bonjour", "namaste"],
    ),
)


def hidden(draw: Draw, paraphrased: bool = False, count: int = 4) -> Sample:
    """Four constants and default arguments among real functions, one in each quarter, each asked on its own."""
    functions = Prose(haystack.functions(), draw.prose.count)
    blocks, questions = [], []
    for fact in draw.rng.sample(FACTS, count):
        right, *others = draw.rng.sample(fact.pool, 4)
        blocks.append(fact.says.format(right))
        ask = fact.paraphrased if paraphrased else fact.plain
        questions.append(Question(ask, right, named(right), tuple(others)))
    lines = replace(draw, prose=functions).lines(*blocks)
    text, _ = spread(draw.rng, lines, blocks)
    depths = (text.index(block.strip()) / len(text) for block in blocks)  # functions are of very different lengths
    return Sample(text, tuple(replace(question, depth=at) for question, at in zip(questions, depths, strict=True)))


TASKS = twice("code", "four constants and default arguments among functions of Python's library", hidden)
