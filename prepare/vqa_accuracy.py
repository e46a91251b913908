"""The VQA benchmark's accuracy (Antol et al. 2015): normalisation of answers and agreement with ten annotators.

Deviation: the official evaluation leaves answers as they are where all ten annotators gave the same one.
"""

import re

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # a period that no digit follows
DIGIT_COMMA = re.compile(r"\d,\d")

# Contractions that the evaluation repairs: "dont" becomes "don't"; "couldnt've" and "couldn'tve" become "couldn't've".
CONTRACTIONS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
    they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
DOUBLE_CONTRACTIONS = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""


def contraction_repairs():
    """{word with an apostrophe missing: the contraction}."""
    repairs = {"somebody'd": "somebodyd"}  # the wrong way round, as in the official table
    for word in CONTRACTIONS.split():
        repairs[word.replace("'", "")] = word
    for word in DOUBLE_CONTRACTIONS.split():
        for position, letter in enumerate(word):
            if letter == "'":
                repairs[word[:position] + word[position + 1 :]] = word
    return repairs


REPAIRS = contraction_repairs()


def normalize_answer(text):
    """The official normalisation of the VQA evaluation (Antol et al. 2015). Punctuation beside a space, and all of it in a
    text with a number like 1,000, is deleted, other punctuation becomes a space; then lower case, digits for the words
    up to ten, no articles, and apostrophes in contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    has_digit_comma = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_digit_comma else " ")
    cleaned = PERIOD.sub("", cleaned)
    words = []
    for word in cleaned.lower().split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(REPAIRS.get(word, word))
    return " ".join(words)


def soft_score(count):
    """min(n/3, 1): three of ten annotators make an answer right."""
    return min(count / 3, 1)


def vqa_accuracy(count, annotators=10):
    """The official accuracy of an answer that `count` annotators gave: the mean of min(n/3, 1) over all ways to leave
    one annotator out. Leaving out one of the `count` leaves count - 1."""
    left = soft_score(count - 1) if count > 0 else 0
    return (count * left + (annotators - count) * soft_score(count)) / annotators
