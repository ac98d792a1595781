"""What the pretrained model reads in these tests."""

LIGHTHOUSE = (
    "The old lighthouse stood at the end of a long stone pier. Every evening at 18:45 its keeper, "
    "a woman named Mary, climbed 132 steps to light the lamp, and every morning she wrote the "
    "number of ships that had passed into a book."
)
PROMPTS = [
    "The capital of Italy is",
    "Once upon a time, there was a little girl who lived with her grandmother in",
    "Water boils at 100 degrees Celsius, and it freezes at",
]
