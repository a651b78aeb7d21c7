"""`python -m sluice.stack`."""

from sluice.stack.command_line import main

main()
