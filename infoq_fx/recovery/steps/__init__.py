"""The recovery steps, one per file; each is a :class:`infoq_fx.RecoveryStep`."""
