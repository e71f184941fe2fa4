"""What each instruction does. A module has a TABLE of them: the first part of their name -> a function that takes

    resolve      the `Operands` of the program, which turns the text of an operand into a getter or setter
    parts        the instruction's name, split at its dots
    operands     their texts

and returns what to run: a function of the warp and of the active lanes (None: all) that returns None, or for control
flow BLOCK or EXIT or a number of a statement to jump to; or (EXIT or number, lanes) if only these lanes do so.

Only what compiled kernels use is here; anything else is refused when a kernel comes to it.
"""
