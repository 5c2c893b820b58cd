"""The catalogue of errors: one class per decision that a caller can take."""

from __future__ import annotations


class MoecError(Exception):
    """Base of everything that moec raises on purpose."""


class OptionError(MoecError):
    """An option is unknown or has a value outside its range."""


class TargetError(MoecError):
    """A command-line target cannot be imported, called or understood."""


class ModelError(MoecError):
    """The model fails on the arguments that were given, compiled or not; its own error is the cause."""


class ParseError(MoecError):
    """A text form (graph, site, expression) does not parse; says where and what was expected."""


class VerifyError(MoecError):
    """A graph or site breaks an invariant between two passes: always a bug in moec."""


class CodegenError(MoecError):
    """A kernel cannot be generated for this spec; the eager twin is used instead."""


class BuildError(MoecError):
    """The host's compiler is missing or rejected a generated source."""
