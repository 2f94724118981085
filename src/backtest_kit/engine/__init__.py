"""Pure decisions: validation, profit, the state machine and its replay. No I/O and no clock."""
