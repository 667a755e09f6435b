"""The steps of recovery, one a file; each is a :class:`infoq_fx.RecoveryStep`."""
