class XAttnResError(ValueError):
    """A mistake that its reader can mend: the message is one line that says what is wrong and what to do."""
