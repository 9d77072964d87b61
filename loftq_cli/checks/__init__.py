"""The checks of `loftq check`: of this device's arithmetic, and of one model on it."""
