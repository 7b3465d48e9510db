"""The order in which a shuffled epoch reads its files: told, or found from the first opens.

`samplers` makes the orders that training libraries make; `finder` recognises one in what is opened;
`told` reads one from a hint; `following` says what comes next. Needs numpy, so import it when needed.
"""
