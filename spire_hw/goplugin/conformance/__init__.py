"""Does an external plugin do what hosts expect of its kind? One module per kind of question.

`suite.examine` starts a plugin as a host does, asks it everything and returns a report. Nothing in
here knows our own plugins.
"""
