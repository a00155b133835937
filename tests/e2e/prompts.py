"""Sixteen prompts for the starter model: English, code, Chinese, emoji, numbers, and a long one."""

LONG = " ".join(
    f"Chapter {i}. In the year {1700 + 7 * i} the town of Arden had {40 + 3 * i} houses, a mill and a well that was "
    f"{i + 5} metres deep; the miller's child counted them every spring and wrote the number on the door."
    for i in range(1, 31)
)  # about 1,500 tokens

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "The three laws of motion are",
    "Q: What is the boiling point of water?\nA:",
    "def fibonacci(n):\n    ",
    "import asyncio\n\nasync def main():\n",
    "SELECT name, age FROM users WHERE",
    "今天天气很好，",
    "中国的首都是",
    "I love pizza 🍕 and sushi 🍣! My favourite food is",
    "🎉🎉🎉 Happy birthday",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "Résumé: l'été à la plage était",
    LONG,
]
