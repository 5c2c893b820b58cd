"""The doctor: whether this machine is able to do what moec does."""
