"""What can go wrong with the servers of one machine, told to a person."""


class StackError(Exception):
    """The message says what is missing or failed, where, and what to do."""
