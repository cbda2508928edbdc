def trust_mixer(**k):
    from lohp_jax.optimizers.online import online_mixer

    return online_mixer(**k)
