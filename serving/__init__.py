"""From a run directory to text, in the terminal and over HTTP.

The path of a request: route -> service -> engine.step -> model -> sampling -> text -> event.
"""
