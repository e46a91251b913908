"""ranges.py: argparse with mistakes in one line, and types that refuse numbers out of range."""

import argparse
import math

from common import UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError, one line: what is wrong, without the whole usage."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def in_range(kind, least, most=math.inf, above=False):
    """A type for argparse: a finite number of this kind, int or float, from `least` to `most`. above=True: `least`
    itself is refused."""

    wanted_kind = "whole number" if kind is int else "number"
    bound = "above" if above else "at least"

    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {wanted_kind}") from None
        if not least <= value <= most or value == math.inf or (above and value == least):
            wanted = f"{bound} {least}"
            if most < math.inf:
                wanted += f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value

    return parse_number


COUNT = in_range(int, 1)
COUNT_OR_ZERO = in_range(int, 0)
SHARE = in_range(float, 0, 1)
POSITIVE = in_range(float, 0, above=True)
NOT_NEGATIVE = in_range(float, 0)
