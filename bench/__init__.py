"""Measuring what a converted model costs and whether it is right: parity, memory, speed.

Knows converted folders and the engine; prints nothing but in scripts that are run by hand.
"""
