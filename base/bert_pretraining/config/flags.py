"""Command-line flags, with underscores or hyphens; errors are one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import NoReturn

from bert_pretraining.config.fields import GROUPS
from bert_pretraining.config.home import expanded_argument
from bert_pretraining.config.settings import FIELDS, base_type
from bert_pretraining.config.trackers import split_names
from bert_pretraining.errors import UserError


def nearest(name: str, names: Iterable[str], means: Callable[[str], str] = str) -> str:
    """ "; did you mean X?" with the most similar name, or "" if none is similar.

    means: X of that name, such as the path of a folder.
    """
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {means(close[0])}?" if close else ""


class FlagParser(argparse.ArgumentParser):
    """Flags with underscores or hyphens; an error is one UserError line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help")

    def parse(self, arguments: list[str], intermixed: bool = False) -> argparse.Namespace:
        """Parse all of `arguments`; the error for an unknown flag names the most similar one.

        intermixed: flags may stand between words of a list. What follows "--" is taken as it is.
        """
        end = arguments.index("--") if "--" in arguments else len(arguments)
        normal = [
            re.sub(r"^--[^=]+", lambda match: "--" + re.sub("[-.]", "_", match[0][2:]), argument)
            for argument in map(expanded_argument, arguments[:end])
        ]
        parse = self.parse_known_intermixed_args if intermixed else self.parse_known_args
        values, unknown = parse([*normal, *arguments[end:]])
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("--"):
                raise UserError(
                    f"unexpected argument '{flag}'", "give every value after its --flag"
                )
            known = [option for option in self._option_string_actions if option.startswith("--")]
            raise UserError(f"unknown flag {flag}{nearest(flag, known)}", "--help lists the flags")
        return values


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of Config. The result has only flags that were given."""
    parser.usage = "%(prog)s [flags]"  # argparse would list all flags, a screen full
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for field in FIELDS.values():
        group = groups[field.metadata["group"]]
        kind = base_type(field)
        text = f"{field.metadata['help']} ({_details(field)})".replace("%", "%%")
        options = {"default": argparse.SUPPRESS, "dest": field.name, "help": text}
        if kind is bool:
            group.add_argument(
                f"--{field.name}", nargs="?", const=True, type=parse_bool, metavar="BOOL",
                **options,
            )  # fmt: skip
            group.add_argument(
                f"--no_{field.name}", action="store_false", dest=field.name,
                default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip
        elif field.metadata["several"]:
            group.add_argument(
                f"--{field.name}", nargs="+", action=_Joined, metavar="NAME", **options
            )
        else:
            metavar = kind.__name__.upper()
            group.add_argument(f"--{field.name}", type=kind, metavar=metavar, **options)


class _Joined(argparse.Action):
    """Several words of a flag, as one text with commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, ",".join(split_names(" ".join(values))))


def _details(field: Field) -> str:
    """A setting's allowed values, and its default if no configuration changes it."""
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    allowed = "|".join(field.metadata["choices"] or ())
    if minimum is not None:
        allowed = f"at least {minimum:g}" if maximum is None else f"{minimum:g} to {maximum:g}"
    default = "none" if field.default is None else f"{field.default}" or "empty"
    return f"{allowed}; default {default}" if allowed else f"default {default}"


def parse_bool(text: str) -> bool:
    """Parse a flag's true or false, for argparse."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
