"""The command line: app.py holds the table of commands, one file a verb, verb.py what all verbs share."""
