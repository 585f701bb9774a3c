"""The plain-Python front end, after Parrot's: semantic functions, variables and sessions.

A function's docstring is its prompt; calling it returns futures at once; what a session has built by the time that
something is asked for goes to the server as one program.
"""
