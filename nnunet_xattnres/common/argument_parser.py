"""The parser of the command's arguments."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from nnunet_xattnres.common.errors import suggestion


class Parser(argparse.ArgumentParser):
    """Explains a mistake in one line."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        # argparse itself complains first about missing options, and lets the main parser complain about unknown ones.
        if self.get_default("run"):  # a command, not a group of them: all arguments are its own
            self._check_options(args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def _check_options(self, arguments: Sequence[str]) -> None:
        known = list(self._option_string_actions)
        for argument in takewhile(lambda argument: argument != "--", arguments):
            name = argument.partition("=")[0]
            if not self._may_be_known(name):
                near = suggestion(name, known, likeness=0.6)
                self.error(f"there is no option {name}{near and f': {near}'}")

    def _may_be_known(self, name: str) -> bool:
        """Whether it is an option, the beginning of a long one, a short one with its value, or no option at all."""
        known = self._option_string_actions
        if name.startswith("--"):
            return any(option.startswith(name) for option in known)
        # argparse would take -c for -chk.
        is_option = name.startswith("-") and name != "-" and " " not in name
        return not is_option or name in known or name[:2] in known or bool(self._negative_number_matcher.match(name))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")
