"""The lab: a small world of text and a model of it, in which the method's claims are tested."""
